import { describe, expect, test } from 'vitest';
import { shapeCpuid } from '#dist/arch/x86_64/cpuid.js';
import { Cpuid } from '#dist/kvm/cpuid.js';
import { kvm_cpuid_entry2 as entry, kvm_cpuid2 } from '#dist/kvm/generated/abi.js';
import { MAX_CPUS } from '#dist/machine/layout.js';

type Entry = readonly [leaf: number, index: number, eax: number, ebx: number, ecx: number, edx: number];

/** As KVM lists them on a host of two sockets of 36 cores with two threads each. */
const INTEL: readonly Entry[] = [
  [0, 0, 0x20, 0x756e6547, 0x6c65746e, 0x49656e69],
  [1, 0, 0xc06f2, 0x15_40_08_00, 0x01202000, 0x1f8bfbff],
  [4, 0, 0xfc004121, 0x02c0003f, 0x3f, 0],
  [4, 1, 0xfc004122, 0x01c0003f, 0x3f, 0],
  [4, 2, 0xfc004143, 0x03c0003f, 0x7ff, 0],
  [4, 3, 0xfc1fc163, 0x04c0003f, 0x3bfff, 4],
  [4, 4, 0, 0, 0, 0],
  [7, 0, 2, 0x01802042, 0x1a010104, 0xbc010400],
  [0xb, 0, 0, 0, 0, 0x15],
  [0x1f, 0, 0, 0, 0, 0x15],
  [0x80000000, 0, 0x80000008, 0, 0, 0],
  [0x80000001, 0, 0, 0, 0x101, 0x20100800],
  [0x80000008, 0, 0x392e, 0x0100d200, 0, 0],
];

/** Likewise, of 64 cores with two threads each, eight cores to an L3. */
const AMD: readonly Entry[] = [
  [0, 0, 0x10, 0x68747541, 0x444d4163, 0x69746e65],
  [1, 0, 0xa00f11, 0x2b_80_08_00, 0x01202000, 0x178bfbff],
  [7, 0, 0, 0x01802042, 0, 0],
  [0xb, 0, 0, 0, 0, 0x2b],
  [0x80000000, 0, 0x8000001e, 0x68747541, 0x444d4163, 0x69746e65],
  [0x80000001, 0, 0xa00f11, 0x40000000, 0x00400111, 0x20100800],
  [0x80000008, 0, 0x3030, 0x0100d200, 0x1_70_7f, 0x10007],
  [0x8000001d, 0, 0x4121, 0x01c0003f, 0x3f, 0],
  [0x8000001d, 1, 0x4122, 0x01c0003f, 0x3f, 0],
  [0x8000001d, 2, 0x4143, 0x01c0003f, 0x3ff, 2],
  [0x8000001d, 3, 0x3c163, 0x03c0003f, 0x7fff, 1],
  [0x8000001d, 4, 0, 0, 0, 0],
  [0x8000001e, 0, 0x2b, 0x115, 0, 0],
];

function tableOf(entries: readonly Entry[], capacity = 64): Cpuid {
  const bytes = new Uint8Array(kvm_cpuid2.entries + capacity * entry.sizeof);
  const view = new DataView(bytes.buffer);
  view.setUint32(kvm_cpuid2.nent, capacity, true);
  const cpuid = Cpuid.of(bytes);
  if (!cpuid) throw new Error('not a table');
  view.setUint32(kvm_cpuid2.nent, entries.length, true);
  const fields = ['function', 'index', 'eax', 'ebx', 'ecx', 'edx'] as const;
  entries.forEach((values, i) => {
    const at = kvm_cpuid2.entries + i * entry.sizeof;
    fields.forEach((field, column) => {
      view.setUint32(at + entry[field], values[column] as number, true);
    });
  });
  return cpuid;
}

const entriesOf = (cpuid: Cpuid): Entry[] =>
  [...cpuid.leaves()].map(({ leaf, index }) => {
    const { eax, ebx, ecx, edx } = reg(cpuid, leaf, index);
    return [leaf, index, eax, ebx, ecx, edx];
  });

function reg(cpuid: Cpuid, leaf: number, index = 0) {
  const registers = cpuid.get(leaf, index);
  if (!registers) throw new Error(`no leaf ${leaf.toString(16)} ${index}`);
  return registers;
}

const bits = (value: number, high: number, low: number) => Math.floor(value / 2 ** low) % 2 ** (high - low + 1);

function shaped(host: readonly Entry[], vcpu: number, vcpus: number): Cpuid {
  const cpuid = tableOf(host);
  shapeCpuid(cpuid, vcpu, vcpus, 'hardware');
  return cpuid;
}

const counts = [2, 3, 4, 5, 8, 64, 65, 128, MAX_CPUS];
const each = (vcpus: number) => [...new Set([0, 1, vcpus >> 1, vcpus - 1])];
/** Bits that tell as many APIC ids apart. */
const widthOf = (vcpus: number) => [1, 2, 4, 8, 16, 32, 64, 128, 256].findIndex((ids) => ids >= vcpus);

describe.each([
  ['Intel', INTEL],
  ['AMD', AMD],
])('%s', (vendor, host) => {
  test('one vCPU: no topology, and nothing else of the host’s changed', () => {
    const expected = host.map(([leaf, index, eax, ebx, ecx, edx]): Entry => {
      if (leaf === 1) return [leaf, index, eax, 0x00_01_08_00, (ecx | 0x81000000) >>> 0, edx & ~(1 << 28)];
      if (leaf === 0xb || leaf === 0x1f) return [leaf, index, 0, 1, 0x100, 0];
      if (leaf === 0x80000008) return [leaf, index, eax, ebx, vendor === 'AMD' ? 0x10000 : 0, edx];
      if (leaf === 0x8000001e) return [leaf, index, 0, 0, 0, 0];
      return [leaf, index, eax, ebx, ecx, edx];
    });
    expect(entriesOf(shaped(host, 0, 1))).toEqual(expected);
  });

  test.each(counts)('%i vCPUs: initial APIC id, logical processors and HTT of leaf 1', (vcpus) => {
    for (const vcpu of each(vcpus)) {
      const { eax, ebx, edx } = reg(shaped(host, vcpu, vcpus), 1);
      expect(bits(ebx, 31, 24)).toBe(vcpu);
      expect(bits(ebx, 23, 16)).toBe(vcpus);
      expect([bits(ebx, 15, 0), bits(edx, 28, 28), eax]).toEqual([0x0800, 1, host[1]?.[2]]);
    }
  });

  // SDM 3A 9.9.3.1: bits of the x2APIC id below the next level; APM 3 E.3.9.
  test.each(counts)('%i vCPUs: extended topology', (vcpus) => {
    for (const leaf of vendor === 'Intel' ? [0xb, 0x1f] : [0xb]) {
      for (const vcpu of each(vcpus)) {
        const cpuid = shaped(host, vcpu, vcpus);
        const [threads, cores, end] = [0, 1, 2].map((index) => reg(cpuid, leaf, index));
        expect(threads).toEqual({ eax: 0, ebx: 1, ecx: 0x100, edx: vcpu });
        expect(cores).toEqual({ eax: widthOf(vcpus), ebx: vcpus, ecx: 0x201, edx: vcpu });
        expect(end).toEqual({ eax: 0, ebx: 0, ecx: 2, edx: vcpu });
      }
    }
  });

  test.each(counts)('%i vCPUs: who shares which cache', (vcpus) => {
    const leaf = vendor === 'Intel' ? 4 : 0x8000001d;
    const cpuid = shaped(host, 1, vcpus);
    const levels = [0, 1, 2, 3].map((index) => reg(cpuid, leaf, index));
    expect(levels.map(({ eax }) => bits(eax, 25, 14) + 1)).toEqual([1, 1, 1, vcpus]);
    for (const [index, { eax, ...sizes }] of levels.entries()) {
      const before = reg(tableOf(host), leaf, index);
      expect({ eax: bits(eax, 13, 0), ...sizes }).toEqual({ ...before, eax: bits(before.eax, 13, 0) });
      // Reserved on AMD; six bits, which more cores do not fit into.
      expect(bits(eax, 31, 26)).toBe(vendor === 'Intel' ? Math.min(vcpus - 1, 63) : 0);
    }
    expect(reg(cpuid, leaf, 4)).toEqual({ eax: 0, ebx: 0, ecx: 0, edx: 0 });
  });
});

test.each(counts)('AMD, %i vCPUs: cores of the package, and that they are no threads', (vcpus) => {
  for (const vcpu of each(vcpus)) {
    const cpuid = shaped(AMD, vcpu, vcpus);
    const { ecx } = reg(cpuid, 0x80000008);
    expect([bits(ecx, 7, 0) + 1, bits(ecx, 15, 12), bits(ecx, 11, 8)]).toEqual([vcpus, widthOf(vcpus), 0]);
    expect(bits(ecx, 17, 16)).toBe(1); // PerfTscSize, as the host has it
    // Extended APIC id; core id and threads of a core less one; node id and nodes of a package less one.
    expect(reg(cpuid, 0x8000001e)).toEqual({ eax: vcpu, ebx: vcpu, ecx: 0, edx: 0 });
    expect(reg(cpuid, 0x80000001).ecx).toBe(0x00400113); // CmpLegacy
  }
});

test('Intel: what only AMD defines stays as it is', () => {
  const cpuid = shaped(INTEL, 1, 4);
  for (const leaf of [0x80000001, 0x80000008]) expect(reg(cpuid, leaf)).toEqual(reg(tableOf(INTEL), leaf));
  expect(cpuid.get(0x8000001e)).toBeUndefined();
});

test('a kernel that is interpreted is not told of what it would do by hypercalls', () => {
  const features = (flavour: 'interpreted' | 'hardware') => {
    const cpuid = tableOf([[0x40000001, 0, 0x01007efb, 0, 0, 0]]);
    shapeCpuid(cpuid, 0, 4, flavour);
    return reg(cpuid, 0x40000001).eax;
  };
  expect([features('interpreted'), features('hardware')]).toEqual([0x0100567b, 0x01007efb]);
});

test('a host without a leaf gets none', () => {
  const old = INTEL.filter(([leaf]) => leaf < 4);
  expect(entriesOf(shaped(old, 1, 2)).map(([leaf]) => leaf)).toEqual([0, 1]);
});

describe('a table', () => {
  test('gets an index of a leaf, with the flag by which KVM tells indices apart, and changes one that is there', () => {
    const cpuid = tableOf([[0xb, 0, 1, 2, 3, 4]]);
    for (const eax of [5, 6]) cpuid.set(0xb, 1, { eax, ebx: 7, ecx: 8, edx: 9 });
    expect(entriesOf(cpuid)).toEqual([
      [0xb, 0, 1, 2, 3, 4],
      [0xb, 1, 6, 7, 8, 9],
    ]);
    expect(cpuid.used[kvm_cpuid2.entries + entry.sizeof + entry.flags]).toBe(1);
    expect(cpuid.used.length).toBe(kvm_cpuid2.entries + 2 * entry.sizeof);
  });

  test('that is full takes none', () => {
    const cpuid = tableOf([[0xb, 0, 0, 0, 0, 0]], 1);
    expect(() => cpuid.set(0xb, 1, { eax: 1, ebx: 0, ecx: 0, edx: 0 })).toThrow(RangeError);
    expect(cpuid.length).toBe(1);
  });
});
