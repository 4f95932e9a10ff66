import { describe, expect, test } from 'vitest';
import { memoryMap } from '#dist/boot/memory-map.js';
import { placeInitrd } from '#dist/boot/placement.js';
import { MemoryError } from '#dist/errors.js';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { GiB, MiB, ram } from '../../support/boot-images.js';

const LINUX_MAX = 0x7fff_ffff;
const kernel = { start: 16 * MiB, end: 20 * MiB + 100 };

function place(size: number, memory: number, taken = [kernel], max = LINUX_MAX): number {
  return placeInitrd('initrd x', size, taken, max, memoryMap(ram(memory)));
}

/** Where, for memory of `size` from 0 that need not exist. */
function placeInLarge(size: number, memory: number, max = LINUX_MAX): number {
  const map = memoryMap(new GuestMemory([{ gpa: 0, buffer: new ArrayBuffer(MiB) }]));
  const large = [...map, { start: MiB, end: memory, type: 1 as const }];
  return placeInitrd('initrd x', size, [kernel], max, large);
}

describe('placeInitrd', () => {
  test('as high as a page allows', () => {
    expect(place(4096, 32 * MiB)).toBe(32 * MiB - 4096);
    expect(place(1, 32 * MiB)).toBe(32 * MiB - 4096);
    expect(place(4097, 32 * MiB)).toBe(32 * MiB - 8192);
  });

  test('right up to the end of the kernel, and not over it', () => {
    const free = 32 * MiB - (20 * MiB + 4096);
    expect(place(free, 32 * MiB)).toBe(20 * MiB + 4096);
    // One byte more goes below the kernel.
    expect(place(free + 1, 32 * MiB)).toBe(16 * MiB - (12 * MiB - 4096) - 4096);
    expect(place(15 * MiB, 32 * MiB)).toBe(MiB);
  });

  test('between pieces of a kernel', () => {
    const pieces = [
      { start: 2 * MiB, end: 4 * MiB },
      { start: 30 * MiB, end: 32 * MiB },
      { start: 8 * MiB, end: 29 * MiB },
    ];
    expect(place(4 * MiB, 32 * MiB, pieces)).toBe(4 * MiB);
    expect(place(MiB, 32 * MiB, pieces)).toBe(29 * MiB);
    expect(place(MiB - 5, 32 * MiB, pieces)).toBe(29 * MiB);
  });

  test('not above what the kernel takes', () => {
    expect(placeInLarge(4096, 3 * GiB)).toBe(2 * GiB - 4096);
    expect(placeInLarge(4096, 3 * GiB, 0xffff_ffff)).toBe(3 * GiB - 4096);
    expect(placeInLarge(2 * GiB - 21 * MiB, 3 * GiB)).toBe(21 * MiB);
    expect(place(131072, 64 * MiB, [kernel], 0x37f_ffff)).toBe(0x37e_0000);
  });

  test('too large for the memory: names how much is needed, and that is enough', () => {
    expect(() => place(16 * MiB, 32 * MiB)).toThrow(MemoryError);
    expect(() => place(16 * MiB, 32 * MiB)).toThrow('needs at least 37 MiB of memory, where the machine has 32 MiB');
    expect(place(16 * MiB, 37 * MiB)).toBe(21 * MiB);
  });

  test('larger than all memory, or than any kernel takes', () => {
    expect(() => place(100 * MiB, 32 * MiB)).toThrow('at least 121 MiB');
    expect(() => placeInLarge(2 * GiB, 3 * GiB)).toThrow('does not fit below 0x80000000');
    expect(() => placeInLarge(2 * GiB, 3 * GiB)).toThrow(MemoryError);
  });
});
