import * as abi from '../../../kvm/generated/abi.js';
import type { VcpuFd } from '../../../kvm/vcpu.js';
import type { VmFd } from '../../../kvm/vm.js';
import type { GuestMemory } from '../../../memory/guest-memory.js';

const MSR_STAR = 0xc0000081;
const MSR_LSTAR = 0xc0000082;
const MSR_FMASK = 0xc0000084;
const PF_VECTOR = 14;
const DB_VECTOR = 1;
const GATE_BYTES = 16;
const IDT_BASE = abi.kvm_sregs.idt + abi.kvm_dtable.base;
const RFLAGS_RF = 1n << 16n;
/** DR7 with breakpoint 0 enabled (L0, G0) for execution; bit 10 always reads one (SDM 3B 17.2.4). */
const DR7_EXECUTE_0 = 0x403n;
const R11 = 11;
const RSP = 4;

/** What handleDebug made of a KVM_EXIT_DEBUG. */
export type DebugOutcome = 'syscall' | 'page-fault' | 'stepped' | 'guest-debug';

/**
 * SYSCALL from guest user mode where KVM interprets the guest's kernel. The instruction runs natively and leaves the vCPU
 * at RIP = LSTAR with CPL still 3, so the guest takes a page fault on its own system call entry. A breakpoint on the
 * guest's #PF handler catches that fault, and what SYSCALL should have done is done there (SDM 2B "SYSCALL"). Every other
 * page fault is let through by executing the one instruction under the breakpoint. The guest's own hardware breakpoints do not fire meanwhile.
 *
 * Works on the vCPU's loaded registers (VcpuFd.loadRegisters).
 */
export class SyscallAssist {
  readonly #vcpu: VcpuFd;
  readonly #complete: () => boolean;
  readonly #memory: GuestMemory;
  readonly #debug = new DataView(new ArrayBuffer(abi.kvm_guest_debug.sizeof));
  #star: bigint = 0n;
  #lstar: bigint = 0n;
  #fmask: bigint = 0n;
  #handler = -1n;
  #gateGpa = -1;
  #idtLow = 0;
  #idtHigh = 0;
  /** The first three words of gate 14 as last seen. */
  readonly #gate = new Uint32Array(3);
  #stepping = false;

  /**
   * Asks for the exits that handleMsrWrite() takes. Right after the VM is made: with an interrupt controller in place the
   * kernel waits 8 ms for a grace period.
   */
  static prepare(vm: VmFd): void {
    vm.exitOnMsrWrites(MSR_STAR, [MSR_STAR, MSR_LSTAR, MSR_FMASK]);
  }

  /** @param complete executes the instruction at RIP on the vCPU's state, if it can: cheaper than a step through KVM. */
  constructor(vcpu: VcpuFd, memory: GuestMemory, complete: () => boolean) {
    this.#complete = complete;
    this.#vcpu = vcpu;
    this.#memory = memory;
  }

  /** Takes the registers over as they are. */
  begin(): void {
    const vcpu = this.#vcpu;
    const msrs = new Map(vcpu.getMsrs([MSR_STAR, MSR_LSTAR, MSR_FMASK]));
    this.#star = msrs.get(MSR_STAR) ?? 0n;
    this.#lstar = msrs.get(MSR_LSTAR) ?? 0n;
    this.#fmask = msrs.get(MSR_FMASK) ?? 0n;
    if (this.#lstar !== 0n) vcpu.syncRegisters();
  }

  /** KVM_EXIT_X86_WRMSR of one of the SYSCALL registers. */
  handleMsrWrite(): void {
    const { runView } = this.#vcpu;
    const index = runView.getUint32(abi.kvm_run.msr_index, true);
    const value = runView.getBigUint64(abi.kvm_run.msr_data, true);
    const taken = this.#vcpu.setMsr(index, value);
    runView.setUint8(abi.kvm_run.msr_error, taken ? 0 : 1); // 1 raises #GP in the guest
    if (!taken) return;
    if (index === MSR_STAR) this.#star = value;
    else if (index === MSR_LSTAR) {
      this.#lstar = value;
      this.#vcpu.syncRegisters(); // from here on follow() looks at them after every exit
    } else if (index === MSR_FMASK) this.#fmask = value;
    this.follow();
  }

  /**
   * Moves the breakpoint when the guest has moved its IDT or changed gate 14. Called at every exit, so it only compares
   * words, and allocates nothing, until something differs.
   */
  follow(): void {
    if (this.#lstar === 0n) return; // no system calls before the guest has set an entry
    const { view } = this.#vcpu.syncedSregs;
    const low = view.getUint32(IDT_BASE, true);
    const high = view.getUint32(IDT_BASE + 4, true);
    if (low !== this.#idtLow || high !== this.#idtHigh || this.#gateGpa < 0) {
      this.#idtLow = low;
      this.#idtHigh = high;
      const gate = this.#vcpu.translate(view.getBigUint64(IDT_BASE, true) + BigInt(PF_VECTOR * GATE_BYTES));
      this.#gateGpa = gate >= 0 && this.#memory.contains(gate, GATE_BYTES) ? gate : -1;
      if (this.#gateGpa < 0) return;
    }
    const gate = this.#gate;
    let same = true;
    for (let i = 0; i < gate.length; i++) {
      const word = this.#memory.readU32(this.#gateGpa + 4 * i);
      if (word !== gate[i]) {
        gate[i] = word;
        same = false;
      }
    }
    if (same) return;
    this.#handler = handlerOf(gate);
    if (!this.#stepping) this.#arm();
  }

  /** KVM_EXIT_DEBUG. */
  handleDebug(): DebugOutcome {
    const regs = this.#vcpu.syncedRegs;
    if (this.#stepping) {
      this.stepDone();
      return 'stepped';
    }
    if (regs.rip !== this.#handler) {
      this.#injectDebugException();
      return 'guest-debug';
    }
    if (this.#enterSystemCall()) return 'syscall';
    if (this.#complete()) return 'page-fault';
    this.#control(abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP);
    this.#stepping = true;
    return 'page-fault';
  }

  /** The instruction under the breakpoint has been executed, by a step or by completion. */
  stepDone(): void {
    if (!this.#stepping) return;
    this.#stepping = false;
    this.#arm();
  }

  #arm(): void {
    this.#debug.setBigUint64(abi.kvm_guest_debug.debugreg, this.#handler, true);
    this.#debug.setBigUint64(abi.kvm_guest_debug.debugreg + 7 * 8, DR7_EXECUTE_0, true);
    this.#control(abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP);
  }

  #control(control: number): void {
    this.#debug.setUint32(abi.kvm_guest_debug.control, control, true);
    this.#vcpu.setGuestDebug(this.#debug);
  }

  /** At the #PF handler: if the fault is a SYSCALL in disguise, does what SYSCALL does. */
  #enterSystemCall(): boolean {
    const regs = this.#vcpu.syncedRegs;
    // Pushed by the fault: error code, RIP, CS, RFLAGS, RSP, SS.
    const stack = regs.gpr(RSP);
    if (this.#read(stack + 8n) !== this.#lstar) return false;
    const cs = this.#read(stack + 16n);
    const userRsp = this.#read(stack + 32n);
    if (cs === undefined || userRsp === undefined || (cs & 3n) !== 3n) return false;
    regs.setGpr(RSP, userRsp);
    regs.rip = this.#lstar;
    regs.rflags = (regs.gpr(R11) & ~this.#fmask & ~RFLAGS_RF) | 2n;
    const selector = Number((this.#star >> 32n) & 0xfffcn);
    const flat = { base: 0n, limit: 0xffffffff, present: 1, dpl: 0, s: 1, g: 1, avl: 0, unusable: 0 };
    const sregs = this.#vcpu.syncedSregs;
    sregs.setSegment('cs', { ...flat, selector, type: 11, db: 0, l: 1 });
    sregs.setSegment('ss', { ...flat, selector: selector + 8, type: 3, db: 1, l: 0 });
    this.#vcpu.markSynced(true);
    return true;
  }

  /** A quadword of guest virtual memory, aligned; undefined where there is none. */
  #read(linear: bigint): bigint | undefined {
    const gpa = this.#vcpu.translate(linear);
    return gpa >= 0 && this.#memory.contains(gpa, 8) ? this.#memory.readU64(gpa) : undefined;
  }

  /** A #DB of the guest's own, e.g. one of its debuggers single-stepping a program: it goes to the guest. */
  #injectDebugException(): void {
    const { runView } = this.#vcpu;
    const debugRegs = this.#vcpu.getDebugRegs();
    debugRegs.setBigUint64(abi.kvm_debugregs.dr6, runView.getBigUint64(abi.kvm_run.debug_dr6, true), true);
    this.#vcpu.setDebugRegs(debugRegs);
    const events = this.#vcpu.getEvents();
    events.setUint8(abi.kvm_vcpu_events.exception_injected, 1);
    events.setUint8(abi.kvm_vcpu_events.exception_nr, DB_VECTOR);
    events.setUint8(abi.kvm_vcpu_events.exception_has_error_code, 0);
    this.#vcpu.setEvents(events);
  }
}

/** The address in a 64-bit interrupt gate (SDM 3A 6.14.1); -1 when the gate is not present. */
function handlerOf(gate: Uint32Array): bigint {
  const [word0 = 0, word1 = 0, word2 = 0] = gate;
  if ((word1 & 0x8000) === 0) return -1n;
  return (BigInt(word2) << 32n) | BigInt((word1 & 0xffff0000) >>> 0) | BigInt(word0 & 0xffff);
}
