import { addon, READY, type RunHost } from '#dist/kvm/addon.js';
import type { Cpuid } from '#dist/kvm/cpuid.js';
import * as abi from '#dist/kvm/generated/abi.js';
import { Kvm, mapMemory } from '#dist/kvm/kvm.js';
import { Regs, type Segment, type Sregs } from '#dist/kvm/registers.js';
import { type VcpuFd, XSAVE_BUFFER } from '#dist/kvm/vcpu.js';
import type { VmFd } from '#dist/kvm/vm.js';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { bare, DONE_PORT, FAULT_PORT, selectors, WITH_ERROR_CODE, writeTables } from './bare-guest-layout.js';

/** How a snippet ended. Registers are those at the end; after a fault, RIP, RSP and RFLAGS are those the CPU pushed. */
export type Outcome =
  | { kind: 'done'; regs: Regs }
  | { kind: 'fault'; regs: Regs; vector: number; errorCode: number | undefined; cr2: bigint; cs: number; ss: number }
  | { kind: 'exit'; regs: Regs; reason: number }
  | { kind: 'timeout'; regs: Regs };

/** Initial CR0 and CR4: protected long mode with write protection, SSE, XSAVE and FSGSBASE allowed. */
const CR0 = 0x8005_0033n;
const CR4 = 0x0004_0620n;
const EFER = 0xd01n;

/** A snippet that runs longer than this is stuck. */
const TIME_LIMIT_US = 3_000_000;
const GENERAL_PROTECTION = 13;

/**
 * The least machine that runs a few bytes of x86-64 code at CPL 0 or 3 and tells how they ended: one vCPU, no devices,
 * no interrupt controller, every exception caught. For tests.
 */
export class BareGuest implements Disposable {
  readonly kvm: Kvm;
  readonly vm: VmFd;
  readonly vcpu: VcpuFd;
  readonly memory: GuestMemory;
  static readonly CR0 = CR0;
  static readonly CR4 = CR4;
  /** Control registers that enter() sets. */
  cr0 = CR0;
  cr4 = CR4;
  readonly #mapping;
  readonly #host: RunHost = new addon.RunHost();
  readonly #timer = addon.timerfdCreate();
  #end = 0n;

  /** @param adjust changes the CPUID that the host supports before the guest gets it. */
  constructor(adjust: (cpuid: Cpuid) => void = () => {}) {
    this.kvm = Kvm.open();
    this.vm = this.kvm.createVm();
    const protection = abi.PROT_READ | abi.PROT_WRITE;
    const flags = abi.MAP_SHARED | abi.MAP_ANONYMOUS;
    this.#mapping = mapMemory(bare.memory, protection, flags, -1, 'mapping a bare guest');
    this.vm.setUserMemoryRegion(0, 0, this.#mapping.buffer);
    this.memory = new GuestMemory([{ gpa: 0, buffer: this.#mapping.buffer }]);
    writeTables(this.memory);
    this.vm.setTssAddr(0xfffb_d000);
    this.vcpu = this.vm.createVcpu(0);
    const cpuid = this.kvm.supportedCpuid();
    adjust(cpuid);
    this.vcpu.setCpuid(cpuid);
    this.#host.setRunnable([this.#host.attachVcpu(this.vcpu.fd, this.vcpu.run, false)], true);
  }

  /**
   * Puts a snippet into the code page, followed by `out DONE_PORT, al`, which ends it at CPL 0; at CPL 3, where IOPL is
   * 0, the #GP of that `out` does. @returns its address.
   */
  load(code: Uint8Array, at: number = bare.code): bigint {
    this.memory.write(at, code);
    this.#end = BigInt(at + code.length);
    this.memory.write(at + code.length, Uint8Array.of(0xe6, DONE_PORT, 0xf4));
    return BigInt(at);
  }

  /** Places the vCPU: registers, privilege level, and the descriptor tables of this guest. */
  enter(cpl: 0 | 3, regs: Regs, bases: { fs?: bigint; gs?: bigint } = {}): void {
    const sregs = this.vcpu.getSregs();
    this.placeSregs(cpl, sregs, bases);
    this.vcpu.setSregs(sregs);
    regs.rflags |= 2n;
    this.vcpu.setRegs(regs);
    this.vcpu.setEvents(new DataView(new ArrayBuffer(abi.kvm_vcpu_events.sizeof)));
  }

  /** Fills in what enter() gives the vCPU. */
  placeSregs(cpl: 0 | 3, sregs: Sregs, bases: { fs?: bigint; gs?: bigint } = {}): void {
    placeSregs(sregs, cpl, this, bases);
  }

  /** Runs until the snippet ends, faults, or leaves for another reason. */
  run(): Outcome {
    const reason = this.#enterGuest();
    const regs = this.vcpu.getRegs();
    if (reason < 0) return { kind: 'timeout', regs };
    if (reason !== abi.KVM_EXIT_IO) return { kind: 'exit', regs, reason };
    const port = this.vcpu.runView.getUint16(abi.kvm_run.io_port, true);
    this.#finishIo();
    if (port === DONE_PORT) return this.#done(this.vcpu.getRegs());
    if (port !== FAULT_PORT) return { kind: 'exit', regs, reason };
    const fault = this.#fault(regs);
    const ended = fault.vector === GENERAL_PROTECTION && fault.regs.rip === this.#end && (fault.cs & 3) === 3;
    return ended ? this.#done(fault.regs) : fault;
  }

  #done(regs: Regs): Outcome {
    regs.rip = this.#end;
    regs.rflags &= ~0x10000n; // RF, which faults push as 1
    return { kind: 'done', regs };
  }

  /** KVM_RUN. @returns the exit reason, or -1 when time ran out. */
  #enterGuest(): number {
    const deadline = performance.now() + TIME_LIMIT_US / 1000;
    addon.timerfdSet(this.#timer, TIME_LIMIT_US);
    this.#host.watch(this.#timer, 0, abi.EPOLLIN);
    for (;;) {
      const reason = this.#host.next();
      if (reason < 0) throw new Error(`KVM_RUN: errno ${-reason}`);
      if (reason < READY) return reason;
      if (performance.now() >= deadline) return -1;
    }
  }

  #fault(regs: Regs): Extract<Outcome, { kind: 'fault' }> {
    const vector = (Number(regs.rip) - bare.stubs) >> 4;
    let frame = Number(regs.gpr(4));
    let errorCode: number | undefined;
    if (WITH_ERROR_CODE.has(vector)) {
      errorCode = this.memory.readU32(frame);
      frame += 8;
    }
    const [rip, cs, rflags, rsp, ss] = [0, 8, 16, 24, 32].map((offset) => this.memory.readU64(frame + offset)) as [
      bigint,
      bigint,
      bigint,
      bigint,
      bigint,
    ];
    regs.rip = rip;
    regs.rflags = rflags;
    regs.setGpr(4, rsp);
    return { kind: 'fault', regs, vector, errorCode, cr2: this.vcpu.getSregs().cr2, cs: Number(cs), ss: Number(ss) };
  }

  /** Lets KVM finish the port access of the last exit, without running on (KVM API 5, immediate_exit). */
  #finishIo(): void {
    this.vcpu.runView.setUint8(abi.kvm_run.immediate_exit, 1);
    addon.ioctl(this.vcpu.fd, abi.KVM_RUN); // -EINTR
    this.vcpu.runView.setUint8(abi.kvm_run.immediate_exit, 0);
  }

  /** The XSAVE area of the vCPU, standard format, with MXCSR at its reset value where KVM's is an old one. */
  xsave(): Uint8Array {
    const area = new Uint8Array(XSAVE_BUFFER);
    this.vcpu.getXsave(area);
    const sseInUse = ((area[512] as number) & 2) !== 0;
    if (!sseInUse) new DataView(area.buffer).setUint32(24, 0x1f80, true);
    return area;
  }

  close(): void {
    this.#host.close();
    addon.close(this.#timer);
    this.vcpu.close();
    this.vm.close();
    this.kvm.close();
    this.#mapping.unmap();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** Registers with RIP at the code page, RSP at the user stack and the given numbered registers. */
export function registers(gprs: Record<number, bigint> = {}, rip: bigint = BigInt(bare.code)): Regs {
  const regs = new Regs();
  regs.setGpr(4, BigInt(bare.userStackTop));
  for (const [number, value] of Object.entries(gprs)) regs.setGpr(Number(number), value);
  regs.rip = rip;
  regs.rflags = 2n;
  return regs;
}

/** Special registers of a vCPU in a guest that writeTables() made. */
export function placeSregs(
  sregs: Sregs,
  cpl: 0 | 3,
  { cr0, cr4 }: { cr0: bigint; cr4: bigint } = { cr0: CR0, cr4: CR4 },
  bases: { fs?: bigint; gs?: bigint } = {},
): void {
  const code = { type: 11, present: 1, dpl: cpl, db: 0, s: 1, l: 1, g: 1, avl: 0, unusable: 0 };
  const all = { base: 0n, limit: 0xffffffff };
  const cs: Segment = { ...all, ...code, selector: cpl ? selectors.userCs : selectors.kernelCs };
  const data: Segment = { ...cs, type: 3, db: 1, l: 0, selector: cpl ? selectors.userSs : selectors.kernelSs };
  sregs.setSegment('cs', cs);
  for (const name of ['ds', 'es', 'ss'] as const) sregs.setSegment(name, data);
  for (const name of ['fs', 'gs'] as const) {
    sregs.setSegment(name, { ...data, selector: 0, dpl: 3, base: bases[name] ?? 0n });
  }
  const tss = { ...data, base: BigInt(bare.tss), limit: 0x67, selector: selectors.tss, type: 11, s: 0, db: 0, g: 0 };
  sregs.setSegment('tr', { ...tss, dpl: 0 });
  sregs.setTable('gdt', BigInt(bare.gdt), 0x4f);
  sregs.setTable('idt', BigInt(bare.idt), 0xfff);
  sregs.cr0 = cr0;
  sregs.cr2 = 0n;
  sregs.cr3 = BigInt(bare.pml4);
  sregs.cr4 = cr4;
  sregs.efer = EFER;
}
