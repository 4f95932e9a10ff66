import * as abi from '../../../kvm/generated/abi.js';
import type { SegmentName } from '../../../kvm/registers.js';
import type { VcpuFd } from '../../../kvm/vcpu.js';
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { CodeFetch } from './code-fetch.js';
import { injectException, injectSingleStep } from './events.js';
import { GuestFault, generalProtection, Unsupported, undefinedOpcode, vector } from './fault.js';
import type { Instruction } from './instruction.js';
import { LinearMemory } from './linear-memory.js';
import { access } from './page-walk.js';
import { cr0, cr4, EFER_LMA, rflags } from './register-bits.js';
import { ExtendedState } from './xstate.js';

const PGE = 0x80n;

/**
 * The vCPU as an instruction sees it: registers, memory by linear address with the checks and faults of the CPU, and the
 * injection of what it raises. Registers are those KVM leaves in kvm_run at an exit, so that most completions make no
 * system call; KVM takes the changes at the next KVM_RUN.
 */
export class GuestCpu {
  readonly vcpu: VcpuFd;
  readonly memory: LinearMemory;
  readonly state: ExtendedState;
  /** Code size in bits: 64, 32 or 16. */
  mode = 64;
  cpl = 0;
  cr0 = 0;
  cr4 = 0;
  readonly code: CodeFetch;
  #sregsChanged = false;
  constructor(vcpu: VcpuFd, memory: GuestMemory) {
    this.vcpu = vcpu;
    this.memory = new LinearMemory(memory);
    this.state = new ExtendedState(vcpu);
    this.code = new CodeFetch(this, memory);
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
    this.memory.configure(sregs, this.regs.rflags, this.state.cpuid.physicalBits);
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
    else if (stepping) injectSingleStep(this.vcpu);
  }
  #trap: (() => void) | undefined;

  /** For an instruction that is itself a trap: what to do once RIP is after it. */
  afterRetire(trap: () => void): void {
    this.#trap = trap;
  }

  /** Makes KVM take the registers at its next entry, and drop the #UD it queues with an emulation failure. */
  commit(): void {
    this.vcpu.markSynced(this.#sregsChanged);
  }

  /** Raises a fault at the instruction: RIP stays, RF is set in the image that the guest's handler gets. */
  raise(fault: GuestFault): void {
    if (fault.cr2 !== undefined) {
      this.sregs.cr2 = fault.cr2;
      this.#sregsChanged = true;
    }
    this.regs.rflags |= rflags.RF;
    this.commit();
    injectException(this.vcpu, fault.vector, fault.errorCode);
  }

  /** Makes KVM drop every translation it keeps: it does when CR4 changes, whatever the bit. */
  flushTlb(): void {
    const { sregs } = this;
    const before = sregs.cr4;
    sregs.clearInterruptBitmap();
    for (const value of [before ^ PGE, before]) {
      sregs.cr4 = value;
      this.vcpu.setSregs(sregs);
    }
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
    this.open(linear, into.length, access.READ);
    this.memory.get(0, into);
  }

  /** Writes guest memory: all of it, or on a fault none. */
  writeLinear(linear: bigint, data: Uint8Array): void {
    this.open(linear, data.length, access.WRITE);
    this.memory.put(0, data);
  }

  /** LinearMemory.open with the rights of the running code. */
  open(linear: bigint, length: number, kind: number): void {
    this.memory.open(linear, length, kind, this.cpl === 3);
  }

  /** Reads a descriptor table, as the CPU itself does whatever the privilege level (SDM 3A 4.6: implicit accesses). */
  readImplicit(linear: bigint, into: Uint8Array): void {
    this.memory.open(linear, into.length, access.READ, false);
    this.memory.get(0, into);
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
}
