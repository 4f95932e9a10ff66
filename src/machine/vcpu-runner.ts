import { constants } from 'node:os';
import type { NestedAssist } from '../arch/x86_64/assist/nested-assist.js';
import type { Bus } from '../bus/bus.js';
import { errnoName } from '../errors.js';
import { RUN_FAILED } from '../kvm/addon.js';
import { exitName } from '../kvm/exits.js';
import * as abi from '../kvm/generated/abi.js';
import type { VcpuFd } from '../kvm/vcpu.js';
import type { MachineEnd } from './end.js';
import type { ExitData } from './exit-data.js';
import type { Processor } from './hardware.js';
import type { HostServices } from './host-services.js';

const { ECANCELED } = constants.errno;

/** A machine's buses. */
export interface Buses {
  readonly ports: Bus;
  readonly mmio: Bus;
}

/** A vCPU that is attached to the machine thread's RunHost, and what its exits lead to. Allocates nothing for port and MMIO exits. */
export class VcpuRunner implements Disposable {
  readonly vcpu: VcpuFd;
  readonly host: HostServices;
  /** Of the RunHost. */
  readonly index: number;
  readonly #ports: Bus;
  readonly #mmio: Bus;
  /** Only where KVM interprets the guest's kernel. */
  readonly #assist: NestedAssist | undefined;
  readonly #data: ExitData;

  /** @param processor whose registers are as the guest is to have them. */
  constructor({ vcpu, exits, assist }: Processor, host: HostServices, { ports, mmio }: Buses) {
    this.vcpu = vcpu;
    this.host = host;
    this.#ports = ports;
    this.#mmio = mmio;
    this.#assist = assist;
    this.#data = exits;
    assist?.begin();
    this.index = host.attachVcpu(this);
  }

  /** @param reason as RunHost.next() tells it. */
  exit(reason: number): void {
    const { host, vcpu } = this;
    host.statistics.countExit(reason);
    switch (reason) {
      case abi.KVM_EXIT_IO:
        this.#data.portAccess(this.#ports);
        break;
      case abi.KVM_EXIT_MMIO:
        this.#data.mmioAccess(this.#mmio);
        break;
      case abi.KVM_EXIT_SHUTDOWN:
        host.finish({ reason: 'triple-fault', code: null, message: 'the guest’s CPU shut down (triple fault)' });
        break;
      case abi.KVM_EXIT_SYSTEM_EVENT:
        host.finish(systemEvent(vcpu.runView));
        break;
      case abi.KVM_EXIT_INTERNAL_ERROR:
      case abi.KVM_EXIT_DEBUG:
      case abi.KVM_EXIT_X86_WRMSR:
        if (this.#assist) this.#assist.handleExit(reason, host);
        else host.finish(failure(describeExit(reason, vcpu.runView)));
        break;
      case RUN_FAILED:
        host.finish(failure(`KVM_RUN failed with ${errnoName(host.runHost.failure(this.index))}`));
        break;
      default:
        host.finish(failure(describeExit(reason, vcpu.runView)));
    }
    this.#assist?.follow();
  }

  /**
   * Brings the vCPU to where its state is all in KVM, without running the guest: what the last exit began is finished,
   * which may take further exits (KVM API 5). It is not runnable. @returns whether the guest goes on after it.
   */
  settle(): boolean {
    const { host } = this;
    while (!host.end) {
      const result = host.runHost.settle(this.index);
      if (result === 0) return true;
      if (result === -ECANCELED) return false; // the run loop is told why
      if (result < 0) host.finish(failure(`KVM_RUN failed with ${errnoName(-result)}`));
      else this.exit(result - 1);
    }
    return false;
  }

  [Symbol.dispose](): void {
    this.host.detachVcpu(this);
  }
}

function failure(message: string): MachineEnd {
  return { reason: 'kvm-failure', code: null, message };
}

/** KVM_EXIT_SYSTEM_EVENT (KVM API, section 5). */
function systemEvent(run: DataView): MachineEnd {
  const type = run.getUint32(abi.kvm_run.system_event_type, true);
  if (type === abi.KVM_SYSTEM_EVENT_SHUTDOWN) {
    return { reason: 'guest-shutdown', code: 0, message: 'the guest powered off' };
  }
  if (type === abi.KVM_SYSTEM_EVENT_RESET)
    return { reason: 'guest-reset', code: null, message: 'the guest reset itself' };
  return { reason: 'triple-fault', code: null, message: `the guest crashed (system event ${type})` };
}

function describeExit(reason: number, run: DataView): string {
  if (reason === abi.KVM_EXIT_INTERNAL_ERROR) {
    return `KVM internal error, suberror ${run.getUint32(abi.kvm_run.internal_suberror, true)}`;
  }
  if (reason === abi.KVM_EXIT_FAIL_ENTRY) {
    return `KVM could not enter the guest, hardware reason 0x${run.getBigUint64(abi.kvm_run.fail_entry_reason, true).toString(16)}`;
  }
  return `KVM exit '${exitName(reason)}', which this machine does not handle`;
}
