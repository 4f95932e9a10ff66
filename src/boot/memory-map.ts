import { layout } from '../machine/layout.js';
import type { GuestMemory } from '../memory/guest-memory.js';

/** Address range types: ACPI 6.4 table 15.3; E820_TYPE_* in Linux, XEN_HVM_MEMMAP_TYPE_* in Xen's start_info.h. */
export const E820_RAM = 1;
export const E820_RESERVED = 2;

/** A piece of the physical address map that a guest is told about. */
export interface MapEntry {
  readonly start: number;
  /** The first address after it. */
  readonly end: number;
  readonly type: typeof E820_RAM | typeof E820_RESERVED;
}

/**
 * The e820 map (ACPI 6.4 section 15.1): conventional memory, the MP table's reserved place after it, and RAM from
 * 1 MiB on. Nothing is said of 0xa0000..0x100000, the PC's video memory and ROMs, even where host memory lies behind
 * it, but of ACPI tables and the VM generation ID: they are reserved, not "ACPI reclaim", so that a kernel started later by kexec has them too.
 * @param acpi whether there are ACPI tables
 */
export function memoryMap(memory: GuestMemory, acpi = false): MapEntry[] {
  const { lowMemoryEnd, baseMemoryEnd, acpiTables, highMemoryStart } = layout;
  const map: MapEntry[] = [];
  for (const { start, end } of contiguous(memory)) {
    const add = (from: number, to: number, type: MapEntry['type']) => {
      const piece = { start: Math.max(start, from), end: Math.min(end, to), type };
      if (piece.start < piece.end) map.push(piece);
    };
    add(0, lowMemoryEnd, E820_RAM);
    add(lowMemoryEnd, baseMemoryEnd, E820_RESERVED);
    if (acpi) add(acpiTables, highMemoryStart, E820_RESERVED);
    add(highMemoryStart, Number.MAX_SAFE_INTEGER, E820_RAM);
  }
  return map;
}

/** Whether the guest may take the whole range for RAM. */
export function isRam(map: readonly MapEntry[], start: number, end: number): boolean {
  return map.some((entry) => entry.type === E820_RAM && entry.start <= start && end <= entry.end);
}

/** The end of the RAM that starts at 1 MiB, at most 3 GiB: kernels, initrds and what they use at first go below it. */
export function mainRamEnd(map: readonly MapEntry[]): number {
  const main = map.find((entry) => entry.type === E820_RAM && entry.start === layout.highMemoryStart);
  return main ? Math.min(main.end, layout.mmioHoleStart) : layout.lowMemoryEnd;
}

/** Guest RAM with regions that touch joined. */
function contiguous(memory: GuestMemory): { start: number; end: number }[] {
  const joined: { start: number; end: number }[] = [];
  for (const { gpa, size } of memory.ranges) {
    const last = joined.at(-1);
    if (last?.end === gpa) last.end += size;
    else joined.push({ start: gpa, end: gpa + size });
  }
  return joined;
}
