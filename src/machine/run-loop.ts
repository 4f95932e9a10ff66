import { constants } from 'node:os';
import { errnoName } from '../errors.js';
import { READY } from '../kvm/addon.js';
import { exitName } from '../kvm/exits.js';
import * as abi from '../kvm/generated/abi.js';
import type { MachineEnd } from './end.js';
import { ExitData } from './exit-data.js';
import type { HostServices } from './host-services.js';
import type { VirtualMachine } from './virtual-machine.js';

const { ECANCELED } = constants.errno;

/**
 * The hot loop: waits for whatever comes next and gives it to who handles it, until somebody calls host.finish().
 * Allocates nothing for port, MMIO and descriptor events.
 */
export function runLoop(machine: VirtualMachine, host: HostServices): MachineEnd {
  const { runHost, events, statistics } = host;
  const data = new ExitData(machine.vcpu.run.buffer);

  for (;;) {
    const event = runHost.next();
    if (event < 0) return failure(`KVM_RUN failed with ${errnoName(-event)}`);
    try {
      if (event >= READY) {
        events.dispatch(event & 0xffff);
      } else {
        statistics.countExit(event);
        handleExit(event, machine, host, data);
      }
    } catch (error) {
      if (!host.end) throw error; // otherwise it threw because of the end: guest memory is lost
    }
    if (host.end) return host.end;
  }
}

function handleExit(reason: number, machine: VirtualMachine, host: HostServices, data: ExitData): void {
  const { ports, mmio, assist, vcpu } = machine;
  switch (reason) {
    case abi.KVM_EXIT_IO:
      data.portAccess(ports);
      break;
    case abi.KVM_EXIT_MMIO:
      data.mmioAccess(mmio);
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
      if (assist) assist.handleExit(reason, host);
      else host.finish(failure(describeExit(reason, vcpu.runView)));
      break;
    default:
      host.finish(failure(describeExit(reason, vcpu.runView)));
  }
  assist?.follow();
}

/**
 * Brings the vCPU to where its state is all in KVM, without running the guest: what the last exit began is finished,
 * which may take further exits (KVM API 5). @returns whether the guest goes on after it.
 */
export function settle(machine: VirtualMachine, host: HostServices): boolean {
  const data = new ExitData(machine.vcpu.run.buffer);
  while (!host.end) {
    const result = host.runHost.settle();
    if (result === 0) return true;
    if (result === -ECANCELED) return false; // the run loop is told why
    if (result < 0) host.finish(failure(`KVM_RUN failed with ${errnoName(-result)}`));
    else handleExit(result - 1, machine, host, data);
  }
  return false;
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
