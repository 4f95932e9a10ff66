import { readFileSync } from 'node:fs';
import { detectKvmFlavour } from '#dist/arch/x86_64/assist/detect.js';
import { InstructionAssist } from '#dist/arch/x86_64/assist/instruction-assist.js';
import type { Cpuid } from '#dist/kvm/cpuid.js';
import * as abi from '#dist/kvm/generated/abi.js';
import type { Regs } from '#dist/kvm/registers.js';
import { BareGuest, type Outcome, registers } from '../../support/bare-guest.js';
import { bare } from '../../support/bare-guest-layout.js';

/** The memory that cases read and write: from the data pages to the last special page. */
export const WINDOW = { start: bare.data, length: bare.noExecute + 0x1000 - bare.data } as const;

/** Everything that an instruction starts from. */
export interface Case {
  readonly code: Uint8Array;
  /** Numbered registers; others are 0. */
  readonly gprs: readonly bigint[];
  readonly rflags: bigint;
  readonly fsBase?: bigint;
  readonly gsBase?: bigint;
  /** What the window holds. */
  readonly memory: Uint8Array;
  /** x87, SSE and extended state. */
  readonly xsave: Uint8Array;
  readonly cr0?: bigint;
  readonly cr4?: bigint;
}

/** Everything that it ends with. */
export interface Result {
  readonly outcome: Outcome;
  readonly memory: Uint8Array;
  readonly xsave: Uint8Array;
  /** What complete() returned; undefined in native runs. */
  readonly kind: string | undefined;
}

/**
 * Tells the guest of XSAVEC and XSAVES, which a nested KVM may leave out of the CPUID that it offers. Whether the CPU has
 * XSAVEC for the native side of a comparison is in hasXsavec.
 */
function offerCompaction(cpuid: Cpuid): void {
  cpuid.update(0xd, 1, ({ eax }) => ({ eax: eax | 0xf }));
}

export const hasXsavec = / xsavec( |$)/m.test(readFileSync('/proc/cpuinfo', 'latin1'));

/** Runs one instruction natively or through the assist, from the same state. */
export class Executor implements Disposable {
  readonly guest = new BareGuest(offerCompaction);
  readonly assist = new InstructionAssist(this.guest.vcpu, this.guest.memory);
  readonly interpreted = detectKvmFlavour() === 'interpreted';
  readonly #xsaveLength = this.guest.vm.checkExtension(abi.KVM_CAP_XSAVE2) || 4096;
  readonly xcr0: bigint;
  /**
   * Components that user mode has beyond those of XCR0: a nested KVM may run it with the host's own XCR0, which holds what
   * no guest is offered, such as AMX. What the CPU does natively with those is not what it would do in this vCPU.
   */
  readonly hostOnly: bigint;

  constructor() {
    const leaf = this.guest.kvm.supportedCpuid().get(0xd);
    this.xcr0 = (BigInt(leaf?.edx ?? 0) << 32n) | BigInt(leaf?.eax ?? 3);
    this.guest.vcpu.setXcr0(this.xcr0);
    this.hostOnly = this.#nativeXcr0() & ~this.xcr0;
  }

  #nativeXcr0(): bigint {
    this.guest.enter(3, registers({ 1: 0n }, this.guest.load(Uint8Array.of(0x0f, 0x01, 0xd0)))); // xgetbv
    const { regs } = this.guest.run();
    return (regs.gpr(2) << 32n) | regs.gpr(0);
  }

  /** As the CPU does it, in user mode: that is native on every kind of host. */
  native(test: Case): Result {
    this.#prepare(test, 3);
    return this.#result(this.guest.run(), undefined);
  }

  /**
   * The same for XRSTOR. Where it faults, CPUs may have loaded a part of the state (Linux, arch/x86/kernel/fpu/signal.c,
   * restore_fpregs_from_user); complete() loads all of it or none, so the state is then the one that was there before.
   */
  nativeLoad(test: Case): Result {
    const result = this.native(test);
    if (result.outcome.kind !== 'fault') return result;
    this.#prepare(test, 3);
    return { ...result, xsave: this.#xsave() };
  }

  /** By complete() alone, on any host: the instruction itself is never given to KVM. */
  completed(test: Case, cpl: 0 | 3): Result {
    this.place(test, cpl);
    return this.#complete();
  }

  /** The same for code that is in memory already. */
  completedAt(test: Case, cpl: 0 | 3, rip: bigint): Result {
    this.place(test, cpl);
    this.guest.vcpu.syncedRegs.rip = rip;
    return this.#complete();
  }

  /** Puts the vCPU where an exit of KVM_RUN at the instruction would leave it. */
  place(test: Case, cpl: 0 | 3): void {
    this.#prepare(test, cpl);
    this.guest.vcpu.loadRegisters();
  }

  #complete(): Result {
    const kind = this.assist.complete();
    if (kind === undefined) throw new Error(`complete() does not know ${this.assist.describe().text}`);
    return this.#result(this.guest.run(), kind);
  }

  /** In kernel mode, by whatever runs it there, with the assist called as the run loop calls it. */
  kernel(test: Case): Result {
    this.#prepare(test, 0);
    const outcome = this.guest.run();
    if (outcome.kind !== 'exit' || outcome.reason !== abi.KVM_EXIT_INTERNAL_ERROR) {
      return this.#result(outcome, undefined);
    }
    this.guest.vcpu.loadRegisters();
    const kind = this.assist.complete();
    return this.#result(kind === undefined ? outcome : this.guest.run(), kind);
  }

  #prepare(test: Case, cpl: 0 | 3): void {
    const { guest } = this;
    guest.memory.write(WINDOW.start, test.memory);
    const rip = guest.load(test.code);
    const regs: Regs = registers({}, rip);
    test.gprs.forEach((value, number) => {
      regs.setGpr(number, value);
    });
    regs.rflags = test.rflags | 2n;
    guest.cr0 = test.cr0 ?? BareGuest.CR0;
    guest.cr4 = test.cr4 ?? BareGuest.CR4;
    guest.enter(cpl, regs, { fs: test.fsBase ?? 0n, gs: test.gsBase ?? 0n });
    guest.vcpu.setXsave(test.xsave);
  }

  #result(outcome: Outcome, kind: string | undefined): Result {
    const { guest } = this;
    const memory = guest.memory.slice(WINDOW.start, WINDOW.length).slice();
    return { outcome, memory, xsave: this.#xsave(), kind };
  }

  #xsave(): Uint8Array {
    return this.guest.xsave().subarray(0, this.#xsaveLength);
  }

  close(): void {
    this.guest.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
