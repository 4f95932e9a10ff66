import { addon, type Mapping } from './addon.js';
import { Cpuid } from './cpuid.js';
import * as abi from './generated/abi.js';
import { kvmIoctl, mapMemory } from './kvm.js';
import { Regs, Sregs } from './registers.js';

/** An XSAVE area as KVM passes it: the standard (not compacted) format. Its length is what the addon insists on. */
export const XSAVE_BUFFER = 65536;

/** A vCPU's file descriptor and its shared kvm_run page (KVM API, sections 2 and 5). */
export class VcpuFd implements Disposable {
  readonly fd: number;
  /** kvm_run and the page of port data after it. */
  readonly run: Mapping;
  readonly runView: DataView;
  /** Registers as of the last exit: after loadRegisters(), or at every exit once syncRegisters() was called. */
  readonly syncedRegs: Regs;
  readonly syncedSregs: Sregs;

  constructor(fd: number, mmapSize: number) {
    this.fd = fd;
    this.run = mapMemory(mmapSize, abi.PROT_READ | abi.PROT_WRITE, abi.MAP_SHARED, fd, 'mapping kvm_run');
    const { buffer } = this.run;
    this.runView = new DataView(buffer);
    const at = abi.kvm_run.s;
    this.syncedRegs = new Regs(new BigUint64Array(buffer, at + abi.kvm_sync_regs.regs, abi.kvm_regs.sizeof / 8));
    this.syncedSregs = new Sregs(new DataView(buffer, at + abi.kvm_sync_regs.sregs, abi.kvm_sregs.sizeof));
  }

  getRegs(into: Regs = new Regs()): Regs {
    this.#ioctl('KVM_GET_REGS', abi.KVM_GET_REGS, 'reading registers', into.words);
    return into;
  }

  setRegs(regs: Regs): void {
    this.#ioctl('KVM_SET_REGS', abi.KVM_SET_REGS, 'setting registers', regs.words);
  }

  getSregs(into: Sregs = new Sregs()): Sregs {
    this.#ioctl('KVM_GET_SREGS', abi.KVM_GET_SREGS, 'reading special registers', into.view);
    return into;
  }

  setSregs(sregs: Sregs): void {
    this.#ioctl('KVM_SET_SREGS', abi.KVM_SET_SREGS, 'setting special registers', sregs.view);
  }

  /**
   * From the next exit on KVM leaves regs and sregs in syncedRegs and syncedSregs by itself (KVM_CAP_SYNC_REGS): cheaper
   * than loadRegisters() where most exits need them, a few percent of every exit where they do not.
   */
  syncRegisters(): void {
    const wanted = abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS;
    this.runView.setBigUint64(abi.kvm_run.kvm_valid_regs, BigInt(wanted), true);
    this.#syncing = true;
  }

  /** Brings syncedRegs and syncedSregs up to date at an exit, unless KVM does. Not after markSynced(). */
  loadRegisters(): void {
    if (this.#syncing) return;
    this.getRegs(this.syncedRegs);
    this.getSregs(this.syncedSregs);
  }
  #syncing = false;

  /**
   * The next KVM_RUN takes these from syncedRegs (and syncedSregs) first. The bitmap of an interrupt being delivered is
   * left out: KVM still has that interrupt, and would queue it a second time, wherever the registers now point.
   */
  markSynced(sregsToo: boolean): void {
    const dirty = abi.KVM_SYNC_X86_REGS | (sregsToo ? abi.KVM_SYNC_X86_SREGS : 0);
    const at = abi.kvm_run.kvm_dirty_regs;
    this.runView.setBigUint64(at, this.runView.getBigUint64(at, true) | BigInt(dirty), true);
    if (sregsToo) this.syncedSregs.clearInterruptBitmap();
  }

  /** struct kvm_fpu: x87 and SSE state (KVM API 4.22). */
  getFpu(into: Uint8Array): void {
    this.#ioctl('KVM_GET_FPU', abi.KVM_GET_FPU, 'reading the FPU', into);
  }

  setFpu(fpu: Uint8Array): void {
    this.#ioctl('KVM_SET_FPU', abi.KVM_SET_FPU, 'setting the FPU', fpu);
  }

  /** @param into XSAVE_BUFFER bytes (KVM API 4.134). */
  getXsave(into: Uint8Array): void {
    this.#ioctl('KVM_GET_XSAVE2', abi.KVM_GET_XSAVE2, 'reading the XSAVE state', into);
  }

  setXsave(xsave: Uint8Array): void {
    this.#ioctl('KVM_SET_XSAVE', abi.KVM_SET_XSAVE, 'setting the XSAVE state', xsave);
  }

  /** XCR0 (KVM API 4.44). */
  getXcr0(): bigint {
    const view = new DataView(new ArrayBuffer(abi.kvm_xcrs.sizeof));
    this.#ioctl('KVM_GET_XCRS', abi.KVM_GET_XCRS, 'reading XCR0', view);
    return view.getBigUint64(abi.kvm_xcrs.xcrs + abi.kvm_xcr.value, true);
  }

  setXcr0(value: bigint): void {
    const view = new DataView(new ArrayBuffer(abi.kvm_xcrs.sizeof));
    view.setUint32(abi.kvm_xcrs.nr_xcrs, 1, true);
    view.setBigUint64(abi.kvm_xcrs.xcrs + abi.kvm_xcr.value, value, true);
    this.#ioctl('KVM_SET_XCRS', abi.KVM_SET_XCRS, 'setting XCR0', view);
  }

  /** One model-specific register (KVM API 4.18); undefined when KVM does not have it. */
  getMsr(index: number): bigint | undefined {
    const view = msrEntries([[index, 0n]]);
    if (this.#ioctl('KVM_GET_MSRS', abi.KVM_GET_MSRS, 'reading an MSR', view) !== 1) return undefined;
    return view.getBigUint64(abi.kvm_msrs.entries + abi.kvm_msr_entry.data, true);
  }

  /** @returns whether KVM took it (KVM API 4.19). */
  setMsr(index: number, value: bigint): boolean {
    const view = msrEntries([[index, value]]);
    return this.#ioctl('KVM_SET_MSRS', abi.KVM_SET_MSRS, 'setting an MSR', view) === 1;
  }

  /** Those model-specific registers that KVM has of these (KVM API 4.18). */
  getMsrs(indices: readonly number[]): [index: number, value: bigint][] {
    const found: [number, bigint][] = [];
    // KVM stops at the first that it does not have.
    for (let next = 0; next < indices.length; next++) {
      const view = msrEntries(indices.slice(next).map((index) => [index, 0n]));
      const count = this.#ioctl('KVM_GET_MSRS', abi.KVM_GET_MSRS, 'reading MSRs', view);
      for (let i = 0; i < count; i++, next++) {
        const at = abi.kvm_msrs.entries + i * abi.kvm_msr_entry.sizeof + abi.kvm_msr_entry.data;
        found.push([indices[next] as number, view.getBigUint64(at, true)]);
      }
    }
    return found;
  }

  /** @returns those that KVM did not take (KVM API 4.19). */
  setMsrs(entries: readonly (readonly [index: number, value: bigint])[]): number[] {
    const refused: number[] = [];
    for (let next = 0; next < entries.length; next++) {
      const view = msrEntries(entries.slice(next));
      next += this.#ioctl('KVM_SET_MSRS', abi.KVM_SET_MSRS, 'setting MSRs', view);
      const entry = entries[next];
      if (entry) refused.push(entry[0]);
    }
    return refused;
  }

  /** Whether it runs, is halted, waits for a SIPI (KVM API 4.38). */
  getMpState(): number {
    const view = new DataView(new ArrayBuffer(abi.kvm_mp_state.sizeof));
    this.#ioctl('KVM_GET_MP_STATE', abi.KVM_GET_MP_STATE, 'reading the vCPU’s run state', view);
    return view.getUint32(abi.kvm_mp_state.mp_state, true);
  }

  setMpState(state: number): void {
    const view = new DataView(new ArrayBuffer(abi.kvm_mp_state.sizeof));
    view.setUint32(abi.kvm_mp_state.mp_state, state, true);
    this.#ioctl('KVM_SET_MP_STATE', abi.KVM_SET_MP_STATE, 'setting the vCPU’s run state', view);
  }

  /** struct kvm_lapic_state: the local APIC's register page (KVM API 4.57). */
  getLapic(): Uint8Array {
    const lapic = new Uint8Array(abi.kvm_lapic_state.sizeof);
    this.#ioctl('KVM_GET_LAPIC', abi.KVM_GET_LAPIC, 'reading the local APIC', lapic);
    return lapic;
  }

  setLapic(lapic: Uint8Array): void {
    this.#ioctl('KVM_SET_LAPIC', abi.KVM_SET_LAPIC, 'setting the local APIC', lapic);
  }

  /** What CPUID tells the guest now (KVM API 4.69). */
  getCpuid(): Cpuid {
    const cpuid = Cpuid.ofCapacity(256);
    this.#ioctl('KVM_GET_CPUID2', abi.KVM_GET_CPUID2, 'reading CPUID', cpuid.bytes);
    return cpuid;
  }

  /** Tells the guest's clock that the vCPU was stopped, so that its watchdogs forgive it (KVM API 4.75). */
  notePause(): void {
    // EINVAL where the guest has no kvmclock: nobody to tell.
    addon.ioctl(this.fd, abi.KVM_KVMCLOCK_CTRL);
  }

  /** struct kvm_vcpu_events: what is being delivered to the guest (KVM API 4.31). */
  getEvents(): DataView {
    const view = new DataView(new ArrayBuffer(abi.kvm_vcpu_events.sizeof));
    this.#ioctl('KVM_GET_VCPU_EVENTS', abi.KVM_GET_VCPU_EVENTS, 'reading pending events', view);
    return view;
  }

  setEvents(events: DataView): void {
    this.#ioctl('KVM_SET_VCPU_EVENTS', abi.KVM_SET_VCPU_EVENTS, 'setting pending events', events);
  }

  /** struct kvm_debugregs: DR0 to DR3, DR6, DR7 (KVM API 4.32). */
  getDebugRegs(): DataView {
    const view = new DataView(new ArrayBuffer(abi.kvm_debugregs.sizeof));
    this.#ioctl('KVM_GET_DEBUGREGS', abi.KVM_GET_DEBUGREGS, 'reading debug registers', view);
    return view;
  }

  setDebugRegs(view: DataView): void {
    this.#ioctl('KVM_SET_DEBUGREGS', abi.KVM_SET_DEBUGREGS, 'setting debug registers', view);
  }

  /** struct kvm_guest_debug (KVM API 4.87). */
  setGuestDebug(debug: DataView): void {
    this.#ioctl('KVM_SET_GUEST_DEBUG', abi.KVM_SET_GUEST_DEBUG, 'setting a guest breakpoint', debug);
  }

  /** What CPUID tells the guest; before the first KVM_RUN (KVM API 4.68). */
  setCpuid(cpuid: Cpuid): void {
    this.#ioctl('KVM_SET_CPUID2', abi.KVM_SET_CPUID2, 'setting CPUID', cpuid.bytes.subarray());
  }

  /** Guest linear to guest physical by the guest's own tables, ignoring permissions; -1 where unmapped (KVM API 4.16). */
  translate(linear: bigint): number {
    const view = this.#translation;
    view.setBigUint64(abi.kvm_translation.linear_address, linear, true);
    this.#ioctl('KVM_TRANSLATE', abi.KVM_TRANSLATE, 'translating an address', view);
    if (view.getUint8(abi.kvm_translation.valid) === 0) return -1;
    return Number(view.getBigUint64(abi.kvm_translation.physical_address, true));
  }
  readonly #translation = new DataView(new ArrayBuffer(abi.kvm_translation.sizeof));

  close(): void {
    this.run.unmap();
    addon.close(this.fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #ioctl(name: string, request: number, purpose: string, argument: Uint8Array | DataView | BigUint64Array): number {
    return kvmIoctl(this.fd, name, request, purpose, argument);
  }
}

function msrEntries(entries: readonly (readonly [index: number, value: bigint])[]): DataView {
  const view = new DataView(new ArrayBuffer(abi.kvm_msrs.sizeof + entries.length * abi.kvm_msr_entry.sizeof));
  view.setUint32(abi.kvm_msrs.nmsrs, entries.length, true);
  entries.forEach(([index, value], i) => {
    const at = abi.kvm_msrs.entries + i * abi.kvm_msr_entry.sizeof;
    view.setUint32(at + abi.kvm_msr_entry.index, index, true);
    view.setBigUint64(at + abi.kvm_msr_entry.data, value, true);
  });
  return view;
}
