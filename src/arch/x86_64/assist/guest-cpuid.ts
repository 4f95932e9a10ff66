import { Cpuid } from '../../../kvm/cpuid.js';
import { KVM_GET_CPUID2 } from '../../../kvm/generated/abi.js';
import { kvmIoctl } from '../../../kvm/kvm.js';
import type { VcpuFd } from '../../../kvm/vcpu.js';

/** The state component of the protection-key rights: a register of 4 bytes at the start of 8 (SDM 1 13.5.7). */
export const PKRU = 9;

/** One state component of the XSAVE area (SDM 1 13.5, CPUID leaf 0DH). */
export interface Component {
  readonly number: number;
  /** In the standard format; the compacted one has no fixed places. */
  readonly offset: number;
  readonly size: number;
  /** How many of its bytes are saved. */
  readonly saved: number;
  /** Whether the compacted format puts it on a 64-byte boundary. */
  readonly aligned: boolean;
}

/**
 * What the guest's CPUID says of things that an instruction needs. Read once: KVM refuses to change CPUID after the first
 * KVM_RUN.
 */
export class GuestCpuid {
  readonly #cpuid: Cpuid;
  /** MAXPHYADDR. */
  readonly physicalBits: number;
  /** State components 2 and up that XCR0 can enable, in order. */
  readonly components: readonly Component[];
  /** CPUID.(0DH,1):EAX: bit 0 XSAVEOPT, 1 XSAVEC, 2 XGETBV with ECX=1, 3 XSAVES. */
  readonly xsaveFeatures: number;
  /** The bits that IA32_XSS may have. */
  readonly supervisorComponents: bigint;

  constructor(vcpu: VcpuFd) {
    const cpuid = Cpuid.ofCapacity(256);
    kvmIoctl(vcpu.fd, 'KVM_GET_CPUID2', KVM_GET_CPUID2, 'reading the CPUID of a vCPU', cpuid.bytes);
    this.#cpuid = cpuid;
    this.physicalBits = (cpuid.get(0x8000_0008)?.eax ?? 36) & 0xff;
    const features = cpuid.get(0xd, 1);
    this.xsaveFeatures = features?.eax ?? 0;
    this.supervisorComponents = (BigInt(features?.edx ?? 0) << 32n) | BigInt(features?.ecx ?? 0);
    const components: Component[] = [];
    for (let number = 2; number < 63; number++) {
      const leaf = cpuid.get(0xd, number);
      if (!leaf || leaf.eax === 0 || leaf.ecx & 1) continue;
      const saved = number === PKRU ? 4 : leaf.eax;
      components.push({ number, offset: leaf.ebx, size: leaf.eax, saved, aligned: (leaf.ecx & 2) !== 0 });
    }
    this.components = components;
  }

  /** CPUID.(7,0):EBX. */
  get features7(): number {
    return this.#cpuid.get(7, 0)?.ebx ?? 0;
  }
}
