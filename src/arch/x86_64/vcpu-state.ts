import { SnapshotError } from '../../errors.js';
import { Cpuid } from '../../kvm/cpuid.js';
import * as abi from '../../kvm/generated/abi.js';
import { Regs, Sregs } from '../../kvm/registers.js';
import { type VcpuFd, XSAVE_BUFFER } from '../../kvm/vcpu.js';
import { bytesToState, type StateReader } from '../../state-reader.js';

/** Everything that KVM keeps of a vCPU, as JSON: structures of the KVM API in base64, numbers of 64 bits in hexadecimal. */
export interface VcpuState {
  readonly cpuid: string;
  readonly mpState: number;
  readonly regs: string;
  readonly sregs: string;
  /** The XSAVE area without the zeros at its end. */
  readonly xsave: string;
  readonly xcr0: string;
  readonly debugRegs: string;
  readonly lapic: string;
  readonly events: string;
  readonly msrs: readonly { readonly index: number; readonly value: string }[];
}

const MSR_TSC = 0x10;
const MSR_TSC_DEADLINE = 0x6e0;
const MAX_CPUID_ENTRIES = 256;
const MAX_MSRS = 1024;
const MAX_MP_STATE = 16;

/** @param msrIndices those that make up the state (KVM_GET_MSR_INDEX_LIST). The vCPU's last exit is settled. */
export function saveVcpu(vcpu: VcpuFd, msrIndices: readonly number[]): VcpuState {
  const xsave = new Uint8Array(XSAVE_BUFFER);
  vcpu.getXsave(xsave);
  let xsaveEnd = xsave.length;
  while (xsaveEnd > 0 && xsave[xsaveEnd - 1] === 0) xsaveEnd--;
  // KVM_GET_MP_STATE first: it lets the local APIC take what is pending for it (INIT and SIPI).
  const mpState = vcpu.getMpState();
  return {
    mpState,
    cpuid: bytesToState(vcpu.getCpuid().used),
    regs: bytesToState(vcpu.getRegs().words),
    sregs: bytesToState(vcpu.getSregs().view),
    xsave: bytesToState(xsave.subarray(0, xsaveEnd)),
    xcr0: vcpu.getXcr0().toString(16),
    debugRegs: bytesToState(vcpu.getDebugRegs()),
    lapic: bytesToState(vcpu.getLapic()),
    msrs: vcpu.getMsrs(msrIndices).map(([index, value]) => ({ index, value: value.toString(16) })),
    events: bytesToState(vcpu.getEvents()),
  };
}

/**
 * Gives a new vCPU a saved state. The order is KVM's: CPUID says what the rest may hold, the local APIC's mode comes with
 * SREGS, the TSC before the deadline that is measured by it, and events last, since setting registers clears them.
 * @param msrIndices those that may be set: KVM lets a VMM set others, by which a guest could learn or change what it may not.
 * @throws SnapshotError when the state cannot be, or is another host's.
 */
export function restoreVcpu(vcpu: VcpuFd, state: StateReader, msrIndices: readonly number[]): void {
  const { sizeof, entries } = abi.kvm_cpuid2;
  const limit = sizeof + MAX_CPUID_ENTRIES * abi.kvm_cpuid_entry2.sizeof;
  const cpuid = Cpuid.of(state.bytes('cpuid', entries, limit));
  if (!cpuid) state.refuse('cpuid', 'is not as long as it says');
  const xsave = new Uint8Array(XSAVE_BUFFER);
  xsave.set(state.bytes('xsave', 0, XSAVE_BUFFER));
  const regs = new Regs(new BigUint64Array(state.bytes('regs', abi.kvm_regs.sizeof).buffer));
  const sregs = new Sregs(view(state.bytes('sregs', abi.kvm_sregs.sizeof)));
  const debugRegs = view(state.bytes('debugRegs', abi.kvm_debugregs.sizeof));
  const lapic = state.bytes('lapic', abi.kvm_lapic_state.sizeof);
  const events = view(state.bytes('events', abi.kvm_vcpu_events.sizeof));
  const mpState = state.number('mpState', 0, MAX_MP_STATE);
  const xcr0 = state.bigint('xcr0');
  const msrs = state.list('msrs', MAX_MSRS).map((msr) => {
    return [msr.number('index', 0, 2 ** 32 - 1), msr.bigint('value')] as const;
  });
  const foreign = msrs.find(([index]) => !msrIndices.includes(index));
  if (foreign) state.refuse('msrs', `have 0x${foreign[0].toString(16)}, which this host’s KVM does not list`);
  const of = (...indices: number[]) => msrs.filter(([index]) => indices.includes(index));
  const others = msrs.filter(([index]) => index !== MSR_TSC && index !== MSR_TSC_DEADLINE);
  try {
    vcpu.setCpuid(cpuid);
    vcpu.setMpState(mpState);
    vcpu.setRegs(regs);
    vcpu.setSregs(sregs);
    vcpu.setXcr0(xcr0);
    vcpu.setXsave(xsave);
    vcpu.setDebugRegs(debugRegs);
    setMsrs(vcpu, of(MSR_TSC));
    vcpu.setLapic(lapic);
    setMsrs(vcpu, others);
    setMsrs(vcpu, attainable(vcpu, of(MSR_TSC)[0]?.[1], of(MSR_TSC_DEADLINE)));
    vcpu.setEvents(events);
  } catch (cause) {
    if (cause instanceof SnapshotError || !(cause instanceof Error)) throw cause;
    const why = `KVM of this host refuses the vCPU’s state: ${cause.message}`;
    throw new SnapshotError(`snapshot: ${why}; it is damaged, or of a host with another CPU`, { cause });
  }
}

/**
 * KVM under PVM leaves the TSC to the host's, which begins anew with the host: a deadline that is measured by a higher one
 * would be hours away.
 */
function attainable(vcpu: VcpuFd, saved: bigint | undefined, deadlines: readonly (readonly [number, bigint])[]) {
  const behind = (saved ?? 0n) - (vcpu.getMsr(MSR_TSC) ?? 0n);
  return deadlines.map(([index, value]) => [index, behind > 0n && value > behind ? value - behind : value] as const);
}

/** KVM lists MSRs that it lets nobody set: what has the value already is as good. */
function setMsrs(vcpu: VcpuFd, msrs: readonly (readonly [index: number, value: bigint])[]): void {
  for (const index of vcpu.setMsrs(msrs)) {
    const wanted = msrs.find((msr) => msr[0] === index)?.[1] as bigint;
    if (vcpu.getMsr(index) === wanted) continue;
    throw new SnapshotError(
      `snapshot: KVM of this host does not take ${wanted.toString(16)} for MSR 0x${index.toString(16)}; ` +
        'it is of a host with another CPU or kernel',
    );
  }
}

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
