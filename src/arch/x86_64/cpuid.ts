import type { Cpuid } from '../../kvm/cpuid.js';
import type { KvmFlavour } from './assist/detect.js';

const bit = (n: number) => 2 ** n;
const without = (value: number, ...bits: number[]) => bits.reduce((v, n) => v & ~(1 << n), value) >>> 0;

/**
 * Makes what KVM supports into what one vCPU reports: its own APIC id and topology (SDM 2A "CPUID"), and, where the
 * guest's kernel is interpreted, none of the features that would only send its kernel through slower or unimplemented
 * instructions there. User programs see the host's CPUID on such hosts whatever is set here, unless the CPU can be made to
 * fault on CPUID.
 */
export function shapeCpuid(cpuid: Cpuid, vcpu: number, vcpus: number, flavour: KvmFlavour): void {
  cpuid.update(1, 0, ({ ebx, ecx, edx }) => ({
    // EBX: CLFLUSH size and brand stay; logical processors, initial APIC id. ECX 31: a hypervisor is present.
    ebx: ((ebx & 0xffff) | (vcpus << 16) | (vcpu << 24)) >>> 0,
    ecx: (ecx | bit(31) | bit(24)) >>> 0, // 24: TSC deadline timer of the in-kernel local APIC
    edx: vcpus > 1 ? edx | bit(28) : without(edx, 28),
  }));
  for (const leaf of [0x0b, 0x1f]) {
    // Level 0: threads of a core (1); level 1: cores of the package. EDX: the x2APIC id.
    const width = Math.ceil(Math.log2(vcpus));
    cpuid.update(leaf, 0, () => ({ eax: 0, ebx: 1, ecx: 0x100, edx: vcpu }));
    cpuid.update(leaf, 1, () => ({ eax: width, ebx: vcpus, ecx: 0x201, edx: vcpu }));
    cpuid.update(leaf, 2, () => ({ eax: 0, ebx: 0, ecx: 2, edx: vcpu }));
  }
  // Leaf 4 and 0x8000001d EAX[31:26]: cores of the package less one; AMD 0x80000008 ECX[7:0] likewise.
  cpuid.update(0x80000008, 0, ({ ecx }) => ({ ecx: ((ecx & ~0xf0ff) | (vcpus - 1)) >>> 0 }));
  cpuid.update(0x8000001e, 0, () => ({ eax: vcpu, ebx: vcpu, ecx: 0, edx: 0 }));
  if (flavour === 'interpreted') maskForInterpretation(cpuid);
}

function maskForInterpretation(cpuid: Cpuid): void {
  // Leaf 7. ERMS and FSRM: `rep movsb` is one interpreted step a byte, `rep movsq` one for eight. SMAP: stac and clac
  // around each user access. INVPCID, SMEP, LA57, PKU, RDPID, SHSTK, IBT, AVX-512 in the kernel: no use there.
  cpuid.update(7, 0, ({ ebx, ecx, edx }) => ({
    ebx: without(ebx, 7, 9, 10, 20),
    ecx: without(ecx, 3, 4, 7, 16, 22),
    edx: without(edx, 4, 20),
  }));
  cpuid.update(7, 1, () => ({ eax: 0, ebx: 0, ecx: 0, edx: 0 }));
  // PCID (1.ECX 17) comes back forced; without INVPCID Linux does not use it.
  cpuid.update(0x80000001, 0, ({ edx }) => ({ edx: without(edx, 27) })); // RDTSCP: Linux reads it in the vDSO, natively
}
