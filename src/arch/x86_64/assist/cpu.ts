import * as abi from '../../../kvm/generated/abi.js';
import type { SegmentName } from '../../../kvm/registers.js';
import type { VcpuFd } from '../../../kvm/vcpu.js';
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { CodeFetch } from './code-fetch.js';
import { GuestFault, generalProtection, Unsupported, undefinedOpcode, vector } from './fault.js';
import type { Instruction } from './instruction.js';
import { access, type Paging, translate } from './page-walk.js';
import { ExtendedState } from './xstate.js';

/** CR0, CR4 and RFLAGS bits by name (SDM 3A 2.3 and 2.5). */
export const cr0 = { MP: 2, EM: 4, TS: 8, NE: 0x20, WP: 0x1_0000, PG: 0x8000_0000 } as const;
export const cr4 = {
  TSD: 4,
  OSFXSR: 0x200,
  LA57: 0x1000,
  PCIDE: 0x2_0000,
  OSXSAVE: 0x4_0000,
  SMEP: 0x10_0000,
  SMAP: 0x20_0000,
  PKE: 0x40_0000,
} as const;
export const rflags = {
  CF: 1n,
  PF: 4n,
  AF: 0x10n,
  ZF: 0x40n,
  SF: 0x80n,
  TF: 0x100n,
  IF: 0x200n,
  OF: 0x800n,
  NT: 0x4000n,
  RF: 0x1_0000n,
  VM: 0x2_0000n,
  AC: 0x4_0000n,
} as const;
/** The flags that arithmetic sets. */
export const ARITHMETIC = 0x8d5n;

const EFER_LMA = 0x400n;
const EFER_NXE = 0x800n;
const PAGE = 4096;
const PGE = 0x80n;

/**
 * The vCPU as an instruction sees it: registers, memory by linear address with the checks and faults of the CPU, and the
 * injection of what it raises. Registers are those KVM leaves in kvm_run at an exit, so that most completions make no
 * system call; KVM takes the changes at the next KVM_RUN.
 */
export class GuestCpu {
  readonly vcpu: VcpuFd;
  readonly memory: GuestMemory;
  readonly state: ExtendedState;
  /** Code size in bits: 64, 32 or 16. */
  mode = 64;
  cpl = 0;
  cr0 = 0;
  cr4 = 0;
  readonly code: CodeFetch;
  #sregsChanged = false;
  readonly #paging: Paging = {
    levels: 4,
    root: 0,
    writeProtect: true,
    noExecute: true,
    smep: false,
    smap: false,
    physicalBits: 52,
  };

  constructor(vcpu: VcpuFd, memory: GuestMemory) {
    this.vcpu = vcpu;
    this.memory = memory;
    this.state = new ExtendedState(vcpu);
    this.code = new CodeFetch(this);
  }

  get regs() {
    return this.vcpu.syncedRegs;
  }

  get sregs() {
    return this.vcpu.syncedSregs;
  }

  /** Takes the state of the exit. Nothing of an earlier completion is remembered. */
  begin(): void {
    const { sregs } = this;
    this.cr0 = Number(sregs.cr0 & 0xffff_ffffn);
    this.cr4 = Number(sregs.cr4 & 0xffff_ffffn);
    const { efer } = sregs;
    const cs = abi.kvm_sregs.cs;
    const long = sregs.view.getUint8(cs + abi.kvm_segment.l) !== 0 && (efer & EFER_LMA) !== 0n;
    this.mode = long ? 64 : sregs.view.getUint8(cs + abi.kvm_segment.db) !== 0 ? 32 : 16;
    const protectedMode = (this.cr0 & 1) !== 0;
    this.cpl = protectedMode ? sregs.cpl : 0;
    const paging = this.#paging;
    if (this.cr0 & cr0.PG) {
      if ((efer & EFER_LMA) === 0n) throw new Unsupported('legacy paging');
      paging.levels = this.cr4 & cr4.LA57 ? 5 : 4;
    } else paging.levels = 0;
    paging.root = Number(sregs.cr3 & 0xf_ffff_ffff_f000n);
    paging.writeProtect = (this.cr0 & cr0.WP) !== 0;
    paging.noExecute = (efer & EFER_NXE) !== 0n;
    paging.smep = (this.cr4 & cr4.SMEP) !== 0;
    paging.smap = (this.cr4 & cr4.SMAP) !== 0 && (this.regs.rflags & rflags.AC) === 0n;
    paging.physicalBits = this.state.cpuid.physicalBits;
    this.#sregsChanged = false;
    this.#trap = undefined;
    this.code.begin();
  }

  /** Ends a completed instruction: RIP after it, RF clear, and the single-step trap where TF asks for it. */
  retire(length: number): void {
    const { regs } = this;
    const next = regs.rip + BigInt(length);
    regs.rip = this.mode === 64 ? BigInt.asUintN(64, next) : next & 0xffff_ffffn;
    const stepping = (regs.rflags & rflags.TF) !== 0n;
    regs.rflags &= ~rflags.RF;
    this.commit();
    // A software interrupt delivers with TF cleared: its own trap comes first and the single-step one never.
    if (this.#trap) this.#trap();
    else if (stepping) this.#singleStepTrap();
  }
  #trap: (() => void) | undefined;

  /** For an instruction that is itself a trap: what to do once RIP is after it. */
  afterRetire(trap: () => void): void {
    this.#trap = trap;
  }

  /** The gate of a software interrupt must exist and be open to this privilege level (SDM 3A 6.12.1.2). */
  requireGate(number: number, errorCode: number): void {
    if (this.mode !== 64) throw new Unsupported('software interrupt outside 64-bit mode');
    const { base, limit } = this.sregs.table('idt');
    if (number * 16 + 15 > limit) throw generalProtection(errorCode);
    const gate = new Uint8Array(16);
    this.readImplicit(base + BigInt(number * 16), gate);
    const attributes = gate[5] as number;
    const type = attributes & 0x1f;
    if (type !== 14 && type !== 15) throw generalProtection(errorCode);
    if (((attributes >> 5) & 3) < this.cpl) throw generalProtection(errorCode);
    if (!(attributes & 0x80)) throw new GuestFault(vector.NP, errorCode);
  }

  /** Makes KVM take the registers at its next entry, and drop the #UD it queues with an emulation failure. */
  commit(): void {
    this.vcpu.markSynced(this.#sregsChanged);
  }

  /** For what changes special registers. */
  sregsChanged(): void {
    this.#sregsChanged = true;
  }

  /** Raises a fault at the instruction: RIP stays, RF is set in the image that the guest's handler gets. */
  raise(fault: GuestFault): void {
    if (fault.cr2 !== undefined) {
      this.sregs.cr2 = fault.cr2;
      this.#sregsChanged = true;
    }
    this.regs.rflags |= rflags.RF;
    this.commit();
    this.inject(fault.vector, fault.errorCode);
  }

  /** Has KVM deliver an exception through the guest's IDT at its next entry (KVM API 4.32). */
  inject(number: number, errorCode?: number): void {
    const events = this.vcpu.getEvents();
    const at = abi.kvm_vcpu_events;
    events.setUint8(at.exception_injected, 1);
    events.setUint8(at.exception_pending, 0);
    events.setUint8(at.exception_nr, number);
    events.setUint8(at.exception_has_error_code, errorCode === undefined ? 0 : 1);
    events.setUint32(at.exception_error_code, errorCode ?? 0, true);
    this.vcpu.setEvents(events);
  }

  /** Has KVM deliver a software interrupt: no error code, whatever its number. */
  injectSoftware(number: number): void {
    const events = this.vcpu.getEvents();
    const at = abi.kvm_vcpu_events;
    for (const flag of [at.exception_injected, at.exception_pending, at.interrupt_shadow]) events.setUint8(flag, 0);
    events.setUint8(at.interrupt_injected, 1);
    events.setUint8(at.interrupt_soft, 1);
    events.setUint8(at.interrupt_nr, number);
    this.vcpu.setEvents(events);
  }

  #singleStepTrap(): void {
    const debug = this.vcpu.getDebugRegs();
    const { dr6 } = abi.kvm_debugregs;
    debug.setBigUint64(dr6, debug.getBigUint64(dr6, true) | 0x4000n, true); // BS
    this.vcpu.setDebugRegs(debug);
    this.inject(vector.DB);
  }

  /** Makes KVM drop every translation it keeps: it does when CR4 changes, whatever the bit. */
  flushTlb(): void {
    const sregs = this.vcpu.getSregs();
    const before = sregs.cr4;
    sregs.cr4 = before ^ PGE;
    this.vcpu.setSregs(sregs);
    sregs.cr4 = before;
    this.vcpu.setSregs(sregs);
  }

  requireCpl0(): void {
    if (this.cpl !== 0) throw generalProtection();
  }

  /** What every XSAVE-family instruction checks first (SDM 1 13.5.4). */
  requireXsave(): void {
    if (!(this.cr4 & cr4.OSXSAVE)) throw undefinedOpcode();
    if (this.cr0 & cr0.TS) throw new GuestFault(vector.NM);
  }

  /** What every SSE instruction checks first (SDM 3A 14.1.1). */
  requireSse(): void {
    if (this.cr0 & cr0.EM || !(this.cr4 & cr4.OSFXSR)) throw undefinedOpcode();
    if (this.cr0 & cr0.TS) throw new GuestFault(vector.NM);
  }

  /** The register as a number of `size` bytes. */
  gpr(number: number, size: number): bigint {
    const value = this.regs.gpr(number);
    return size === 8 ? value : BigInt.asUintN(size * 8, value);
  }

  /** Writes a register: 4 bytes clear the upper half, fewer leave the rest (SDM 1 3.4.1.1). */
  setGpr(number: number, size: number, value: bigint): void {
    if (size >= 4) this.regs.setGpr(number, BigInt.asUintN(size * 8, value));
    else {
      const mask = (1n << BigInt(size * 8)) - 1n;
      this.regs.setGpr(number, (this.regs.gpr(number) & ~mask) | (value & mask));
    }
  }

  setFlags(mask: bigint, values: bigint): void {
    this.regs.rflags = (this.regs.rflags & ~mask) | values;
  }

  /** Offset of the memory operand in its segment. */
  effectiveAddress(insn: Instruction): bigint {
    const { regs } = this;
    let address = BigInt(insn.displacement);
    if (insn.ripRelative) address += regs.rip + BigInt(insn.length);
    if (insn.base >= 0) address += regs.gpr(insn.base);
    if (insn.index >= 0) address += regs.gpr(insn.index) << BigInt(insn.scale);
    return BigInt.asUintN(insn.addressSize * 8, address);
  }

  /** The linear address of the memory operand, checked for its whole length (SDM 3A 5.3 and 3.3.7.1). */
  linearAddress(insn: Instruction, length: number, write: boolean): bigint {
    return this.segmented(insn.segment, this.effectiveAddress(insn), length, write);
  }

  segmented(name: SegmentName, offset: bigint, length: number, write: boolean): bigint {
    const wrong = () => new GuestFault(name === 'ss' ? vector.SS : vector.GP, 0);
    if (this.mode === 64) {
      const base = name === 'fs' || name === 'gs' ? this.sregs.segmentBase(name) : 0n;
      const linear = BigInt.asUintN(64, base + offset);
      const bits = this.cr4 & cr4.LA57 ? 57 : 48;
      const last = linear + BigInt(length - 1);
      if (BigInt.asUintN(64, BigInt.asIntN(bits, linear)) !== linear) throw wrong();
      if (last >> 64n || BigInt.asUintN(64, BigInt.asIntN(bits, last)) !== last) throw wrong();
      return linear;
    }
    const { base, limit, unusable, type, present } = this.sregs.segment(name);
    const expandDown = (type & 0xc) === 4;
    if (expandDown) throw new Unsupported('expand-down segment');
    if (this.cr0 & 1) {
      if (unusable || !present) throw wrong();
      if (write ? (type & 0xa) !== 2 : (type & 0xa) === 8) throw wrong();
    }
    if (offset + BigInt(length - 1) > BigInt(limit)) throw wrong();
    return (base + offset) & 0xffff_ffffn;
  }

  /** Reads guest memory at a linear address, with the rights of the running code. */
  readLinear(linear: bigint, into: Uint8Array): void {
    this.#pages(linear, into.length, access.READ, this.cpl === 3);
    this.#transfer(linear, into, false);
  }

  /** Writes guest memory: all of it, or on a fault none. */
  writeLinear(linear: bigint, data: Uint8Array): void {
    this.#pages(linear, data.length, access.WRITE, this.cpl === 3);
    this.#transfer(linear, data, true);
  }

  /** Raises the fault that a write would raise; the write itself then cannot fault. */
  probeWrite(linear: bigint, length: number): void {
    this.#pages(linear, length, access.WRITE, this.cpl === 3);
  }

  /** Reads a descriptor table, as the CPU itself does whatever the privilege level (SDM 3A 4.6: implicit accesses). */
  readImplicit(linear: bigint, into: Uint8Array): void {
    this.#pages(linear, into.length, access.READ, false);
    this.#transfer(linear, into, false);
  }

  /** Physical address of the code byte at a linear address. */
  fetchable(linear: bigint): number {
    return translate(this.memory, this.#paging, linear, access.FETCH, this.cpl === 3);
  }

  readMemory(insn: Instruction, into: Uint8Array): void {
    this.readLinear(this.linearAddress(insn, into.length, false), into);
  }

  writeMemory(insn: Instruction, data: Uint8Array): void {
    this.writeLinear(this.linearAddress(insn, data.length, true), data);
  }

  readMemoryNumber(insn: Instruction, size: number): bigint {
    const part = this.#scratch.subarray(0, size);
    this.readMemory(insn, part);
    return this.#number(size);
  }

  writeMemoryNumber(insn: Instruction, size: number, value: bigint): void {
    this.#scratchView.setBigUint64(0, BigInt.asUintN(64, value), true);
    this.writeMemory(insn, this.#scratch.subarray(0, size));
  }

  /** The operand in ModRM.rm, register or memory, of `size` bytes. */
  readRm(insn: Instruction, size: number): bigint {
    return insn.memory ? this.readMemoryNumber(insn, size) : this.gpr(insn.rm, size);
  }

  #number(size: number): bigint {
    return BigInt.asUintN(size * 8, this.#scratchView.getBigUint64(0, true));
  }
  readonly #scratch = new Uint8Array(8);
  readonly #scratchView = new DataView(this.#scratch.buffer);

  // Physical addresses of the pages of the access being made, in order.
  readonly #frames: number[] = [];

  #pages(linear: bigint, length: number, kind: number, user: boolean): void {
    const offset = Number(linear & 0xfffn);
    const count = Math.ceil((offset + length) / PAGE);
    this.#frames.length = 0;
    for (let i = 0; i < count; i++) {
      // A fault reports the first byte of the access that is on the page.
      const at = i === 0 ? linear : linear - BigInt(offset) + BigInt(i * PAGE);
      const physical = translate(this.memory, this.#paging, at, kind, user);
      if (!this.memory.contains(physical, 1)) throw new Unsupported('operand is not in RAM');
      this.#frames.push(physical - (physical % PAGE));
    }
  }

  #transfer(linear: bigint, data: Uint8Array, write: boolean): void {
    let offset = Number(linear & 0xfffn);
    for (let done = 0, i = 0; done < data.length; i++) {
      const length = Math.min(PAGE - offset, data.length - done);
      const part = data.subarray(done, done + length);
      const at = (this.#frames[i] as number) + offset;
      if (write) this.memory.write(at, part);
      else this.memory.read(at, part);
      done += length;
      offset = 0;
    }
  }
}
