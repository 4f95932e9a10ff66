import { describe, expect, test } from 'vitest';
import { writeMpTable } from '#dist/arch/x86_64/mptable.js';
import { BOOT_CS, BOOT_DS, writeBootGdt, writeBootPageTables } from '#dist/arch/x86_64/page-tables.js';
import { IOAPIC_PINS, layout, MAX_CPUS } from '#dist/machine/layout.js';
import type { GuestMemory } from '#dist/memory/guest-memory.js';
import { GiB, MiB, ram } from '../../support/boot-images.js';

describe('boot page tables', () => {
  /** Walks four levels as the CPU would: Intel SDM volume 3, section 4.5. */
  function translate(memory: GuestMemory, cr3: number, address: number): number | undefined {
    let table = BigInt(cr3);
    for (let shift = 39; ; shift -= 9) {
      const index = Math.floor(address / 2 ** shift) % 512;
      const entry = memory.readU64(Number(table) + 8 * index);
      if ((entry & 3n) !== 3n) return undefined;
      const target = entry & 0x000f_ffff_ffff_f000n;
      if (entry & 0x80n) return Number(target) + (address % 2 ** shift);
      table = target;
    }
  }

  test('map the first 4 GiB to themselves and nothing beyond', () => {
    const memory = ram(MiB);
    const cr3 = writeBootPageTables(memory);
    expect(cr3 % 4096).toBe(0);
    for (const address of [
      0,
      1,
      0x1fffff,
      0x200000,
      0x1000000,
      GiB - 1,
      GiB,
      3 * GiB + 5,
      layout.ioapic,
      4 * GiB - 1,
    ]) {
      expect(translate(memory, cr3, address)).toBe(address);
    }
    for (const address of [4 * GiB, 512 * GiB]) expect(translate(memory, cr3, address)).toBeUndefined();
  });

  test('write six pages and nothing else', () => {
    const memory = ram(MiB);
    writeBootPageTables(memory);
    const { bootPageTables: start } = layout;
    const end = start + 6 * 4096;
    expect(memory.slice(0, start).every((byte) => byte === 0)).toBe(true);
    expect(memory.slice(end, MiB - end).every((byte) => byte === 0)).toBe(true);
  });
});

test('the boot GDT has flat 64-bit code and data where the boot protocol wants them', () => {
  const memory = ram(MiB);
  const gdt = writeBootGdt(memory);
  expect(memory.readU64(gdt)).toBe(0n);
  const decode = (selector: number) => {
    const d = memory.readU64(gdt + selector);
    return {
      base: ((d >> 16n) & 0xffffffn) | ((d >> 56n) << 24n),
      limit: (d & 0xffffn) | (((d >> 48n) & 0xfn) << 16n),
      type: (d >> 40n) & 0x1fn,
      present: (d >> 47n) & 1n,
      long: (d >> 53n) & 1n,
      big: (d >> 54n) & 1n,
      granularity: (d >> 55n) & 1n,
    };
  };
  const flat = { base: 0n, limit: 0xfffffn, present: 1n, granularity: 1n };
  expect(decode(BOOT_CS)).toEqual({ ...flat, type: 0x1bn, long: 1n, big: 0n });
  expect(decode(BOOT_DS)).toEqual({ ...flat, type: 0x13n, long: 0n, big: 1n });
});

describe('MP table', () => {
  const sum = (bytes: Uint8Array) => bytes.reduce((total, byte) => (total + byte) & 0xff, 0);

  /** Reads the table as MP 1.4 chapter 4 says. */
  function parse(memory: GuestMemory) {
    const pointer = memory.slice(0x9fc00, 16);
    expect(Buffer.from(pointer.subarray(0, 4)).toString()).toBe('_MP_');
    expect([pointer[8], pointer[9], sum(pointer)]).toEqual([1, 4, 0]);
    expect([...pointer.subarray(11)]).toEqual([0, 0, 0, 0, 0]);
    const at = memory.readU32(0x9fc00 + 4);
    const length = memory.readU16(at + 4);
    const table = memory.slice(at, length);
    expect(Buffer.from(table.subarray(0, 4)).toString()).toBe('PCMP');
    expect(sum(table)).toBe(0);
    // Where e820 has no RAM, and the pointer is not.
    expect(at).toBeGreaterThanOrEqual(layout.lowMemoryEnd);
    expect(at + length).toBeLessThanOrEqual(0x9fc00);
    expect(memory.readU32(at + 36)).toBe(layout.localApic);
    const entries: number[][] = [];
    for (let i = 44; i < length; ) {
      const size = table[i] === 0 ? 20 : 8;
      entries.push([...table.subarray(i, i + size)]);
      i += size;
    }
    expect(entries.length).toBe(memory.readU16(at + 34));
    return entries;
  }

  const edge = (...pins: number[]) => pins.map((pin) => ({ pin, level: false }));
  const all = Array.from({ length: IOAPIC_PINS }, (_, pin) => ({ pin, level: pin % 2 === 1 }));

  test.each([1, 2, 5, MAX_CPUS])('%i CPUs', (cpus) => {
    const memory = ram(MiB);
    writeMpTable(memory, cpus, all);
    const entries = parse(memory);
    const of = (type: number) => entries.filter((entry) => entry[0] === type);
    expect(entries.map((entry) => entry[0])).toEqual(entries.map((entry) => entry[0]).sort());
    expect(of(0).map((e) => [e[1], e[3]])).toEqual(Array.from({ length: cpus }, (_, id) => [id, id === 0 ? 3 : 1]));
    expect(of(1)).toEqual([[1, 0, ...Buffer.from('ISA   ')]]);
    expect(of(2)).toEqual([[2, cpus, 0x11, 1, 0x00, 0x00, 0xc0, 0xfe]]);
    expect(of(3)).toEqual(
      Array.from({ length: 24 }, (_, pin) => [3, 0, pin % 2 === 1 ? 0b1101 : 0, 0, 0, pin, cpus, pin]),
    );
    expect(of(4)).toEqual([
      [4, 3, 0, 0, 0, 0, 0, 0],
      [4, 1, 0, 0, 0, 0, 0xff, 1],
    ]);
  });

  test('lists the pins in use and no other', () => {
    for (const pins of [[], edge(0), edge(8, 0, 23), [...edge(0, 4), { pin: 5, level: true }]]) {
      const memory = ram(MiB);
      writeMpTable(memory, 1, pins);
      const interrupts = parse(memory).filter((entry) => entry[0] === 3);
      expect(interrupts.map((entry) => ({ pin: entry[7], level: entry[2] === 0b1101 }))).toEqual(pins);
    }
  });

  test('a pin that the IOAPIC has not, or twice, is refused', () => {
    for (const pins of [edge(24), edge(-1), edge(0.5), edge(Number.NaN), edge(4, 5, 4)]) {
      expect(() => writeMpTable(ram(MiB), 1, pins)).toThrow(RangeError);
    }
  });
});
