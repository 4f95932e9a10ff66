import { KvmError } from '../../../errors.js';
import { type VcpuFd, XSAVE_BUFFER } from '../../../kvm/vcpu.js';
import { Unsupported } from './fault.js';
import { GuestCpuid } from './guest-cpuid.js';

/** Places in the legacy region and the header (SDM 1 13.4). */
export const area = {
  fcw: 0,
  fsw: 2,
  ftw: 4,
  fop: 6,
  fip: 8,
  fdp: 16,
  mxcsr: 24,
  mxcsrMask: 28,
  st: 32,
  xmm: 160,
  xmmEnd: 416,
  header: 512,
  xcompBv: 520,
  extended: 576,
} as const;

/** State components by bit (SDM 1 13.1). */
export const X87 = 1n;
export const SSE = 2n;
export const AVX = 4n;

export const MXCSR_RESET = 0x1f80;
const FCW_RESET = 0x37f;

/**
 * The vCPU's x87, SSE and extended state, as an XSAVE area in the standard format. Fetched from KVM by load() for the
 * instructions that need it, given back by store().
 */
export class ExtendedState {
  readonly bytes = new Uint8Array(XSAVE_BUFFER);
  readonly view = new DataView(this.bytes.buffer);
  readonly #vcpu: VcpuFd;
  #cpuid: GuestCpuid | undefined;
  /** XSTATE_BV as KVM has it. */
  #loaded = 0n;

  constructor(vcpu: VcpuFd) {
    this.#vcpu = vcpu;
  }

  get cpuid(): GuestCpuid {
    this.#cpuid ??= new GuestCpuid(this.#vcpu);
    return this.#cpuid;
  }

  /**
   * Components that KVM leaves out of XSTATE_BV come with their initial values. MXCSR alone may be an old one: KVM's own
   * image is a compacted one, where it is saved only with SSE, and is copied from there for AVX's sake all the same.
   */
  load(): void {
    this.#vcpu.getXsave(this.bytes);
    this.#loaded = this.xstateBv;
    if (!(this.xstateBv & SSE)) this.mxcsr = MXCSR_RESET;
  }

  store(): void {
    // KVM ignores MXCSR when neither SSE nor a wider state is in use.
    if (this.mxcsr !== MXCSR_RESET) this.xstateBv |= SSE;
    const wanted = this.xstateBv;
    const cleared = this.#loaded & ~wanted;
    if (cleared) {
      // KVM keeps the old values of a component that leaves XSTATE_BV in its own image, and with AVX-512 in use AMD CPUs
      // were seen to count AVX in again without writing it there: the old values came back. PKRU it leaves alone by design
      // (Linux, fpu_copy_uabi_to_guest_fpstate). So they are overwritten first.
      this.xstateBv = wanted | cleared;
      this.#set();
      this.xstateBv = wanted;
    }
    this.#set();
  }

  #set(): void {
    try {
      this.#vcpu.setXsave(this.bytes);
    } catch (error) {
      // Whatever the guest did to get here, it is the guest's trouble.
      if (error instanceof KvmError) throw new Unsupported(error.message);
      throw error;
    }
  }

  get xcr0(): bigint {
    return this.#vcpu.getXcr0();
  }

  /** XINUSE: the components that are not in their initial configuration. */
  get xstateBv(): bigint {
    return this.view.getBigUint64(area.header, true);
  }

  set xstateBv(value: bigint) {
    this.view.setBigUint64(area.header, value, true);
  }

  get mxcsr(): number {
    return this.view.getUint32(area.mxcsr, true);
  }

  set mxcsr(value: number) {
    this.view.setUint32(area.mxcsr, value, true);
  }

  /** Bits that MXCSR may have (SDM 1 11.6.6). */
  get mxcsrMask(): number {
    return this.view.getUint32(area.mxcsrMask, true) || 0xffbf;
  }

  get statusWord(): number {
    return this.view.getUint16(area.fsw, true);
  }

  /** A live view of an XMM register. Whoever writes it calls touchSse() before store(). */
  xmm(number: number): Uint8Array {
    return this.bytes.subarray(area.xmm + number * 16, area.xmm + number * 16 + 16);
  }

  touchSse(): void {
    this.xstateBv |= SSE;
  }

  touchX87(): void {
    this.xstateBv |= X87;
  }

  /** Puts a component into its initial configuration (SDM 1 13.6). XMM has its registers only: MXCSR is apart. */
  initialize(component: bigint): void {
    if (component === X87) {
      this.bytes.fill(0, 0, area.mxcsr);
      this.bytes.fill(0, area.st, area.xmm);
      this.view.setUint16(area.fcw, FCW_RESET, true);
    } else if (component === SSE) this.bytes.fill(0, area.xmm, area.xmmEnd);
    else {
      const found = this.cpuid.components.find((c) => 1n << BigInt(c.number) === component);
      if (found) this.bytes.fill(0, found.offset, found.offset + found.size);
    }
    this.xstateBv &= ~component;
  }
}
