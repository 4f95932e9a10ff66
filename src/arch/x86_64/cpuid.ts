import type { Cpuid } from '../../kvm/cpuid.js';
import type { KvmFlavour } from './assist/detect.js';

const bit = (n: number) => 2 ** n;
const without = (value: number, ...bits: number[]) => bits.reduce((v, n) => v & ~(1 << n), value) >>> 0;

/** EBX of leaf 0: the first four letters of AuthenticAMD and HygonGenuine. */
const AMD = [0x68747541, 0x6f677948];
const TOPOLOGY_LEAVES = [0x0b, 0x1f];
const CACHE_LEAVES = [4, 0x8000001d];

/**
 * Makes what KVM supports into what one vCPU reports: its own APIC id and topology (SDM 2A "CPUID", APM 3 appendix E), and,
 * where the guest's kernel is interpreted, none of the features that would only send its kernel through slower or
 * unimplemented instructions there. The vCPUs are the cores of one package, each of one thread, which share caches from the
 * third level on. User programs see the host's CPUID on such hosts whatever is set here, unless the CPU can be made to
 * fault on CPUID.
 * @param vcpu which, from 0; its APIC id
 * @param vcpus of the machine, 1 to MAX_CPUS
 */
export function shapeCpuid(cpuid: Cpuid, vcpu: number, vcpus: number, flavour: KvmFlavour): void {
  cpuid.update(1, 0, ({ ebx, ecx, edx }) => ({
    // EBX: CLFLUSH size and brand stay; logical processors, initial APIC id. ECX 31: a hypervisor is present.
    ebx: ((ebx & 0xffff) | (vcpus << 16) | (vcpu << 24)) >>> 0,
    ecx: (ecx | bit(31) | bit(24)) >>> 0, // 24: TSC deadline timer of the in-kernel local APIC
    edx: vcpus > 1 ? edx | bit(28) : without(edx, 28),
  }));
  // Level 0: threads of a core (1). EDX: the x2APIC id.
  for (const leaf of TOPOLOGY_LEAVES) cpuid.update(leaf, 0, () => ({ eax: 0, ebx: 1, ecx: 0x100, edx: vcpu }));
  if (AMD.includes(cpuid.get(0)?.ebx ?? 0)) {
    // ECX[7:0]: cores of the package less one; [15:12]: bits of the APIC id that tell them apart.
    const cores = (idBits(vcpus) << 12) | (vcpus - 1);
    cpuid.update(0x80000008, 0, ({ ecx }) => ({ ecx: ((ecx & ~0xf0ff) | cores) >>> 0 }));
  }
  cpuid.update(0x8000001e, 0, () => ({ eax: vcpu, ebx: vcpu, ecx: 0, edx: 0 }));
  if (vcpus > 1) shapePackage(cpuid, vcpu, vcpus);
  if (flavour === 'interpreted') maskForInterpretation(cpuid);
}

/** Bits of the APIC id that tell vCPUs apart. */
function idBits(vcpus: number): number {
  return 32 - Math.clz32(vcpus - 1);
}

/** What a vCPU says of the others of its package. */
function shapePackage(cpuid: Cpuid, vcpu: number, vcpus: number): void {
  for (const leaf of TOPOLOGY_LEAVES) {
    if (!cpuid.get(leaf)) continue;
    // Level 1: cores of the package. Index 2 is no level. KVM lists only index 0.
    cpuid.set(leaf, 1, { eax: idBits(vcpus), ebx: vcpus, ecx: 0x201, edx: vcpu });
    cpuid.set(leaf, 2, { eax: 0, ebx: 0, ecx: 2, edx: vcpu });
  }
  for (const leaf of CACHE_LEAVES) {
    // EAX[25:14]: who shares the cache, less one. [31:26], Intel's leaf only: cores of the package less one.
    const cores = leaf === 4 ? Math.min(vcpus - 1, 63) : 0;
    for (let index = 0; ((cpuid.get(leaf, index)?.eax ?? 0) & 0x1f) !== 0; index++) {
      cpuid.update(leaf, index, ({ eax }) => {
        const sharing = ((eax >>> 5) & 7) >= 3 ? vcpus - 1 : 0;
        return { eax: ((eax & 0x3fff) | (sharing << 14) | (cores << 26)) >>> 0 };
      });
    }
  }
  // CmpLegacy: what leaf 1 counts are cores, not threads of one.
  if (AMD.includes(cpuid.get(0)?.ebx ?? 0)) cpuid.update(0x80000001, 0, ({ ecx }) => ({ ecx: ecx | bit(1) }));
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
  // KVM's paravirtual features that are a hypercall (Documentation/virt/kvm/x86/cpuid.rst): PV_UNHALT, PV_SEND_IPI,
  // PV_SCHED_YIELD. Its emulator puts the host's instruction there and executes that again, for ever.
  cpuid.update(0x40000001, 0, ({ eax }) => ({ eax: without(eax, 7, 11, 13) }));
  // PCID (1.ECX 17) comes back forced; without INVPCID Linux does not use it.
  cpuid.update(0x80000001, 0, ({ edx }) => ({ edx: without(edx, 27) })); // RDTSCP: Linux reads it in the vDSO, natively
}
