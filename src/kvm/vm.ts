import { addon } from './addon.js';
import * as abi from './generated/abi.js';
import { type Kvm, kvmIoctl } from './kvm.js';
import { VcpuFd } from './vcpu.js';

const IRQCHIPS = [abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC];

/** A virtual machine's file descriptor (KVM API, section 2). */
export class VmFd implements Disposable {
  readonly fd: number;
  readonly #kvm: Kvm;
  #hasPit = false;
  readonly #irqLevel = new Uint8Array(abi.kvm_irq_level.sizeof);
  readonly #irqLevelView = new DataView(this.#irqLevel.buffer);

  constructor(fd: number, kvm: Kvm) {
    this.fd = fd;
    this.#kvm = kvm;
  }

  /**
   * Backs guest physical memory with host memory (KVM API 4.35). The backing must outlive the VM or be replaced.
   * @param gpa and backing.byteLength are multiples of 4096.
   */
  setUserMemoryRegion(slot: number, gpa: number, backing: ArrayBuffer, flags = 0): void {
    const { guest_phys_addr, memory_size, userspace_addr, sizeof } = abi.kvm_userspace_memory_region;
    const view = new DataView(new ArrayBuffer(sizeof));
    view.setUint32(abi.kvm_userspace_memory_region.slot, slot, true);
    view.setUint32(abi.kvm_userspace_memory_region.flags, flags, true);
    view.setBigUint64(guest_phys_addr, BigInt(gpa), true);
    view.setBigUint64(memory_size, BigInt(backing.byteLength), true);
    const purpose = `giving the guest ${backing.byteLength} bytes of memory at 0x${gpa.toString(16)}`;
    const request = abi.KVM_SET_USER_MEMORY_REGION;
    kvmIoctl(this.fd, 'KVM_SET_USER_MEMORY_REGION', request, purpose, view, userspace_addr, backing);
  }

  /** Three pages of guest physical space that Intel hosts need (KVM API 4.40). */
  setTssAddr(gpa: number): void {
    kvmIoctl(this.fd, 'KVM_SET_TSS_ADDR', abi.KVM_SET_TSS_ADDR, 'placing the TSS', gpa);
  }

  /** One page for the same purpose; before any vCPU (KVM API 4.42). */
  setIdentityMapAddr(gpa: number): void {
    const argument = BigUint64Array.of(BigInt(gpa));
    const request = abi.KVM_SET_IDENTITY_MAP_ADDR;
    kvmIoctl(this.fd, 'KVM_SET_IDENTITY_MAP_ADDR', request, 'placing the identity map', argument);
  }

  /** PIC, IOAPIC and a local APIC for each vCPU, in the kernel (KVM API 4.24). Before any vCPU. */
  createIrqchip(): void {
    kvmIoctl(this.fd, 'KVM_CREATE_IRQCHIP', abi.KVM_CREATE_IRQCHIP, 'creating the interrupt controllers');
  }

  /** Whether createPit2() has been called. */
  get hasPit(): boolean {
    return this.#hasPit;
  }

  /** An i8254 in the kernel, with port 0x61 (KVM API 4.71). After the interrupt controllers. */
  createPit2(): void {
    const config = new DataView(new ArrayBuffer(abi.kvm_pit_config.sizeof));
    config.setUint32(abi.kvm_pit_config.flags, abi.KVM_PIT_SPEAKER_DUMMY, true);
    kvmIoctl(this.fd, 'KVM_CREATE_PIT2', abi.KVM_CREATE_PIT2, 'creating the timer', config);
    this.#hasPit = true;
  }

  /** The registers of PIC master, PIC slave and IOAPIC, in that order, each a struct kvm_irqchip (KVM API 4.26). */
  getIrqchips(): Uint8Array[] {
    return IRQCHIPS.map((id) => {
      const chip = new Uint8Array(abi.kvm_irqchip.sizeof);
      new DataView(chip.buffer).setUint32(abi.kvm_irqchip.chip_id, id, true);
      kvmIoctl(this.fd, 'KVM_GET_IRQCHIP', abi.KVM_GET_IRQCHIP, 'reading an interrupt controller', chip);
      return chip;
    });
  }

  /** Takes what getIrqchips() gave. */
  setIrqchips(chips: readonly Uint8Array[]): void {
    chips.forEach((chip, index) => {
      // Which chip it is goes by its place: what the bytes say is somebody's input.
      new DataView(chip.buffer, chip.byteOffset).setUint32(abi.kvm_irqchip.chip_id, IRQCHIPS[index] as number, true);
      kvmIoctl(this.fd, 'KVM_SET_IRQCHIP', abi.KVM_SET_IRQCHIP, 'setting an interrupt controller', chip);
    });
  }

  /** struct kvm_pit_state2 (KVM API 4.72). */
  getPit(): Uint8Array {
    const pit = new Uint8Array(abi.kvm_pit_state2.sizeof);
    kvmIoctl(this.fd, 'KVM_GET_PIT2', abi.KVM_GET_PIT2, 'reading the timer', pit);
    return pit;
  }

  setPit(pit: Uint8Array): void {
    kvmIoctl(this.fd, 'KVM_SET_PIT2', abi.KVM_SET_PIT2, 'setting the timer', pit);
  }

  /** The guest's paravirtual clock in nanoseconds since its power-on (KVM API 4.29). */
  getClock(): bigint {
    const view = new DataView(new ArrayBuffer(abi.kvm_clock_data.sizeof));
    kvmIoctl(this.fd, 'KVM_GET_CLOCK', abi.KVM_GET_CLOCK, 'reading the guest’s clock', view);
    return view.getBigUint64(abi.kvm_clock_data.clock, true);
  }

  setClock(nanoseconds: bigint): void {
    const view = new DataView(new ArrayBuffer(abi.kvm_clock_data.sizeof));
    view.setBigUint64(abi.kvm_clock_data.clock, nanoseconds, true);
    kvmIoctl(this.fd, 'KVM_SET_CLOCK', abi.KVM_SET_CLOCK, 'setting the guest’s clock', view);
  }

  /**
   * The pages of a slot that vCPUs have written since the last call, a bit each, which are forgotten (KVM API 4.8). The
   * slot has KVM_MEM_LOG_DIRTY_PAGES.
   * @param into at least a bit for each page, in whole 64-bit words.
   */
  takeDirtyLog(slot: number, into: Uint8Array): void {
    const view = new DataView(new ArrayBuffer(abi.kvm_dirty_log.sizeof));
    view.setUint32(abi.kvm_dirty_log.slot, slot, true);
    const at = abi.kvm_dirty_log.dirty_bitmap;
    kvmIoctl(this.fd, 'KVM_GET_DIRTY_LOG', abi.KVM_GET_DIRTY_LOG, 'reading which pages were written', view, at, into);
  }

  /** @param id 0 is the boot processor; also its local APIC's id (KVM API 4.7). */
  createVcpu(id: number): VcpuFd {
    const fd = kvmIoctl(this.fd, 'KVM_CREATE_VCPU', abi.KVM_CREATE_VCPU, `creating vCPU ${id}`, id);
    try {
      return new VcpuFd(fd, this.#kvm.vcpuMmapSize);
    } catch (error) {
      addon.close(fd);
      throw error;
    }
  }

  /** Sets the level of an interrupt line (KVM API 4.25). Allocates nothing. */
  setIrqLine(gsi: number, level: boolean): void {
    this.#irqLevelView.setUint32(abi.kvm_irq_level.irq, gsi, true);
    this.#irqLevelView.setUint32(abi.kvm_irq_level.level, level ? 1 : 0, true);
    kvmIoctl(this.fd, 'KVM_IRQ_LINE', abi.KVM_IRQ_LINE, 'raising an interrupt', this.#irqLevel);
  }

  /** KVM_ENABLE_CAP on the VM (KVM API 4.37). */
  enableCapability(capability: number, argument: number, purpose: string): void {
    const view = new DataView(new ArrayBuffer(abi.kvm_enable_cap.sizeof));
    view.setUint32(abi.kvm_enable_cap.cap, capability, true);
    view.setBigUint64(abi.kvm_enable_cap.args, BigInt(argument), true);
    kvmIoctl(this.fd, 'KVM_ENABLE_CAP', abi.KVM_ENABLE_CAP, purpose, view);
  }

  /**
   * Guest writes of these MSRs exit as KVM_EXIT_X86_WRMSR from now on; every other access stays as it was (KVM API 4.97).
   * @param base the first of the range that msrs lie in; at most 64 long.
   */
  exitOnMsrWrites(base: number, msrs: readonly number[]): void {
    const reason = abi.KVM_MSR_EXIT_REASON_FILTER;
    this.enableCapability(abi.KVM_CAP_X86_USER_SPACE_MSR, reason, 'asking for MSR exits');
    const { ranges, sizeof, flags } = abi.kvm_msr_filter;
    const view = new DataView(new ArrayBuffer(sizeof));
    view.setUint32(flags, abi.KVM_MSR_FILTER_DEFAULT_ALLOW, true);
    view.setUint32(ranges + abi.kvm_msr_filter_range.flags, abi.KVM_MSR_FILTER_WRITE, true);
    view.setUint32(ranges + abi.kvm_msr_filter_range.nmsrs, 64, true);
    view.setUint32(ranges + abi.kvm_msr_filter_range.base, base, true);
    const bitmap = new Uint8Array(8).fill(0xff); // a clear bit denies
    for (const msr of msrs)
      bitmap[(msr - base) >> 3] = (bitmap[(msr - base) >> 3] as number) & ~(1 << ((msr - base) & 7));
    const at = ranges + abi.kvm_msr_filter_range.bitmap;
    kvmIoctl(this.fd, 'KVM_X86_SET_MSR_FILTER', abi.KVM_X86_SET_MSR_FILTER, 'filtering MSRs', view, at, bitmap);
  }

  /** The value of a capability of this VM. */
  checkExtension(capability: number): number {
    return kvmIoctl(this.fd, 'KVM_CHECK_EXTENSION', abi.KVM_CHECK_EXTENSION, 'asking for a capability', capability);
  }

  close(): void {
    addon.closeLater(this.fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
