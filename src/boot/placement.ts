import { BOOT_GDT_SIZE } from '../arch/x86_64/page-tables.js';
import { ImageError, MemoryError } from '../errors.js';
import { layout, PAGE_SIZE } from '../machine/layout.js';
import { isRam, type MapEntry, mainRamEnd } from './memory-map.js';
import { hex, mebibytes, sizeText } from './text.js';

/** Guest physical addresses from `start` up to, not including, `end`. */
export interface Range {
  readonly start: number;
  readonly end: number;
}

/** What boot writes below 1 MiB; no kernel may be linked there. */
const bootStructures: readonly (Range & { name: string })[] = [
  { name: 'the boot GDT and IDT', start: layout.bootGdt, end: layout.bootGdt + 2 * BOOT_GDT_SIZE },
  { name: 'the PVH start info', start: layout.pvhStartInfo, end: layout.pvhStartInfo + PAGE_SIZE },
  { name: 'the boot parameters', start: layout.bootParams, end: layout.bootParams + PAGE_SIZE },
  { name: 'the boot page tables', start: layout.bootPageTables, end: layout.bootPageTables + 6 * PAGE_SIZE },
  { name: 'the command line', start: layout.commandLine, end: layout.commandLine + layout.commandLineLimit },
];

/**
 * Checks that all a kernel needs is RAM that nothing else uses. MemoryError if more memory would help, with how much;
 * ImageError if none would.
 */
export function checkKernel(name: string, ranges: readonly Range[], map: readonly MapEntry[]): void {
  for (const { start, end } of ranges) {
    const clash = bootStructures.find((other) => start < other.end && other.start < end);
    if (clash) {
      throw new ImageError(
        `${name}: loads at ${hex(start)}..${hex(end)}, over ${clash.name} at ${hex(clash.start)}; link it at 1 MiB or above`,
      );
    }
  }
  const outside = ranges.filter(({ start, end }) => !isRam(map, start, end));
  if (outside.length === 0) return;
  const hopeless = outside.find(({ start, end }) => start < layout.highMemoryStart || end > layout.mmioHoleStart);
  if (hopeless) {
    throw new ImageError(
      `${name}: loads at ${hex(hopeless.start)}..${hex(hopeless.end)}, where there is no RAM; give its segments physical addresses between 1 MiB and 3 GiB`,
    );
  }
  const needed = Math.max(...outside.map(({ end }) => end));
  throw new MemoryError(
    `${name}: needs at least ${mebibytes(needed)} of memory, and the machine has ${sizeText(mainRamEnd(map))}; give it more`,
  );
}

/**
 * Where an initrd goes: the highest page below the end of RAM, `addressMax` and 3 GiB from which it overlaps nothing.
 * High, because the kernel takes its first memory from just above itself.
 * @param addressMax the last address it may use
 */
export function placeInitrd(
  name: string,
  size: number,
  taken: readonly Range[],
  addressMax: number,
  map: readonly MapEntry[],
): number {
  const ramEnd = mainRamEnd(map);
  let top = Math.min(ramEnd, addressMax + 1);
  for (const range of [...taken].sort((a, b) => b.end - a.end)) {
    const start = pageDown(top - size);
    if (start >= range.end) break;
    top = Math.min(top, range.start);
  }
  const start = pageDown(top - size);
  if (start >= layout.highMemoryStart) return start;

  const above = Math.max(layout.highMemoryStart, ...taken.map(({ end }) => end).filter((end) => end <= ramEnd));
  const needed = Math.ceil(above / PAGE_SIZE) * PAGE_SIZE + Math.ceil(size / PAGE_SIZE) * PAGE_SIZE;
  const limit = Math.min(addressMax + 1, layout.mmioHoleStart);
  if (needed > limit) {
    throw new MemoryError(
      `${name}: has ${sizeText(size)}, and does not fit below ${hex(limit)}, the highest address its kernel takes; make it smaller`,
    );
  }
  throw new MemoryError(
    `${name}: has ${sizeText(size)}, and with its kernel needs at least ${mebibytes(needed)} of memory, where the machine has ${sizeText(ramEnd)}; give it more`,
  );
}

function pageDown(address: number): number {
  return Math.floor(address / PAGE_SIZE) * PAGE_SIZE;
}
