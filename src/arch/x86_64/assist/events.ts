import * as abi from '../../../kvm/generated/abi.js';
import type { VcpuFd } from '../../../kvm/vcpu.js';
import { vector } from './fault.js';

// What KVM delivers through the guest's IDT at its next entry (KVM API 4.31 and 4.32).

const at = abi.kvm_vcpu_events;
const DR6_BS = 0x4000n;

/** Has an exception delivered. RIP and the rest of the frame are the vCPU's registers. */
export function injectException(vcpu: VcpuFd, number: number, errorCode?: number): void {
  const events = vcpu.getEvents();
  events.setUint8(at.exception_injected, 1);
  events.setUint8(at.exception_pending, 0);
  events.setUint8(at.exception_nr, number);
  events.setUint8(at.exception_has_error_code, errorCode === undefined ? 0 : 1);
  events.setUint32(at.exception_error_code, errorCode ?? 0, true);
  vcpu.setEvents(events);
}

/** Has a software interrupt delivered: no error code, whatever its number. */
export function injectInterrupt(vcpu: VcpuFd, number: number): void {
  const events = vcpu.getEvents();
  for (const flag of [at.exception_injected, at.exception_pending, at.interrupt_shadow]) events.setUint8(flag, 0);
  events.setUint8(at.interrupt_injected, 1);
  events.setUint8(at.interrupt_soft, 1);
  events.setUint8(at.interrupt_nr, number);
  vcpu.setEvents(events);
}

/** Has the single-step trap delivered (SDM 3A 17.3.1.4). */
export function injectSingleStep(vcpu: VcpuFd): void {
  const debug = vcpu.getDebugRegs();
  const { dr6 } = abi.kvm_debugregs;
  debug.setBigUint64(dr6, debug.getBigUint64(dr6, true) | DR6_BS, true);
  vcpu.setDebugRegs(debug);
  injectException(vcpu, vector.DB);
}
