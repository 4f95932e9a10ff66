import * as abi from '../../../kvm/generated/abi.js';
import type { VcpuFd } from '../../../kvm/vcpu.js';
import type { VmFd } from '../../../kvm/vm.js';
import type { MachineEnd } from '../../../machine/end.js';
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { InstructionAssist } from './instruction-assist.js';
import { SyscallAssist } from './syscall.js';

/** What the assist tells the machine. */
export interface AssistHost {
  readonly statistics: { assist(kind: string): void };
  finish(end: MachineEnd): void;
}

/** Completes what a KVM that interprets the guest's kernel leaves undone: instructions, and SYSCALL from user mode. */
export class NestedAssist {
  readonly #vcpu: VcpuFd;
  readonly #instructions: InstructionAssist;
  readonly #syscalls: SyscallAssist;

  /** Right after the VM is made. */
  static prepare(vm: VmFd): void {
    SyscallAssist.prepare(vm);
  }

  constructor(vcpu: VcpuFd, memory: GuestMemory) {
    this.#vcpu = vcpu;
    this.#instructions = new InstructionAssist(vcpu, memory);
    this.#syscalls = new SyscallAssist(vcpu, memory, () => this.#instructions.complete() !== undefined);
  }

  /** Before the vCPU runs, with its registers as the guest is to have them. */
  begin(): void {
    this.#syscalls.begin();
  }

  /** After every exit: keeps the breakpoint where the guest's page-fault handler is. */
  follow(): void {
    this.#syscalls.follow();
  }

  /** KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_DEBUG or KVM_EXIT_X86_WRMSR. */
  handleExit(reason: number, host: AssistHost): void {
    this.#vcpu.loadRegisters();
    if (reason === abi.KVM_EXIT_X86_WRMSR) {
      this.#syscalls.handleMsrWrite();
      host.statistics.assist('wrmsr');
    } else if (reason === abi.KVM_EXIT_DEBUG) {
      host.statistics.assist(this.#syscalls.handleDebug());
    } else {
      this.#completeInstruction(host);
    }
  }

  #completeInstruction(host: AssistHost): void {
    const suberror = this.#vcpu.runView.getUint32(abi.kvm_run.internal_suberror, true);
    if (suberror !== abi.KVM_INTERNAL_ERROR_EMULATION) {
      host.finish({ reason: 'kvm-failure', code: null, message: `KVM internal error, suberror ${suberror}` });
      return;
    }
    const kind = this.#instructions.complete();
    if (kind !== undefined) {
      host.statistics.assist(kind);
      this.#syscalls.stepDone();
      return;
    }
    const { text } = this.#instructions.describe();
    host.finish({ reason: 'guest-instruction', code: null, message: `KVM cannot interpret an instruction: ${text}` });
  }
}
