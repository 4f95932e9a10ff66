import { describe, expect, test } from 'vitest';
import { E820_RAM, E820_RESERVED, isRam, mainRamEnd, memoryMap } from '#dist/boot/memory-map.js';
import type { GuestMemory } from '#dist/memory/guest-memory.js';
import { GiB, MiB, ram } from '../../support/boot-images.js';

/** Memory with these ranges and nothing behind them: the map only asks where they are. */
function ranges(...list: [gpa: number, size: number][]): GuestMemory {
  const memory = ram(4096);
  Object.defineProperty(memory, 'ranges', { value: list.map(([gpa, size]) => ({ gpa, size })) });
  return memory;
}

const low = [
  { start: 0, end: 0x9e000, type: E820_RAM },
  { start: 0x9e000, end: 0xa0000, type: E820_RESERVED },
];

describe('memoryMap', () => {
  test('8 MiB', () => {
    expect(memoryMap(ram(8 * MiB))).toEqual([...low, { start: MiB, end: 8 * MiB, type: E820_RAM }]);
  });

  test('the place of ACPI tables is reserved, if there are any', () => {
    expect(memoryMap(ram(8 * MiB), true)).toEqual([
      ...low,
      { start: 0xe0000, end: MiB, type: E820_RESERVED },
      { start: MiB, end: 8 * MiB, type: E820_RAM },
    ]);
    expect(memoryMap(ram(8 * MiB), false)).toEqual(memoryMap(ram(8 * MiB)));
  });

  test('exactly up to the MMIO hole', () => {
    expect(memoryMap(ranges([0, 3 * GiB]))).toEqual([...low, { start: MiB, end: 3 * GiB, type: E820_RAM }]);
  });

  test('5 GiB: goes on above 4 GiB', () => {
    const map = memoryMap(ranges([0, 3 * GiB], [4 * GiB, 2 * GiB]));
    expect(map).toEqual([
      ...low,
      { start: MiB, end: 3 * GiB, type: E820_RAM },
      { start: 4 * GiB, end: 6 * GiB, type: E820_RAM },
    ]);
    expect(mainRamEnd(map)).toBe(3 * GiB);
    expect(isRam(map, 3 * GiB - 1, 3 * GiB)).toBe(true);
    expect(isRam(map, 3 * GiB - 1, 3 * GiB + 1)).toBe(false);
    expect(isRam(map, 5 * GiB, 6 * GiB)).toBe(true);
  });

  test('regions that touch are one, and a region may end anywhere', () => {
    const map = memoryMap(ranges([0, 0xa0000], [MiB, MiB], [2 * MiB, 4096]));
    expect(map).toEqual([...low, { start: MiB, end: 2 * MiB + 4096, type: E820_RAM }]);
    expect(isRam(map, MiB, 2 * MiB + 4096)).toBe(true);
  });

  test('the hole of video memory and ROMs is never RAM', () => {
    const map = memoryMap(ram(2 * MiB));
    for (const address of [0x9e000, 0x9fc00, 0xa0000, 0xf0000, MiB - 1])
      expect(isRam(map, address, address + 1)).toBe(false);
  });

  test('memory that ends below 1 MiB', () => {
    const map = memoryMap(ram(0xa0000));
    expect(map).toEqual(low);
    expect(mainRamEnd(map)).toBe(0x9e000);
  });
});
