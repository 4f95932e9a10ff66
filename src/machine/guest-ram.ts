import { errnoName, MemoryError, SnapshotError } from '../errors.js';
import type { Mapping } from '../kvm/addon.js';
import {
  KVM_MEM_LOG_DIRTY_PAGES,
  MADV_HUGEPAGE,
  MAP_ANONYMOUS,
  MAP_NORESERVE,
  MAP_PRIVATE,
  MAP_SHARED,
  PROT_READ,
  PROT_WRITE,
} from '../kvm/generated/abi.js';
import { mapMemory } from '../kvm/kvm.js';
import type { VmFd } from '../kvm/vm.js';
import { GuestMemory } from '../memory/guest-memory.js';
import { PagedMemory } from '../memory/paged-memory.js';
import { layout, PAGE_SIZE } from './layout.js';
import type { PageFaults } from './page-faults.js';

/** Node's ArrayBuffers end at 4 GiB; half of it keeps every offset a small number to the compiler. */
const MAX_REGION = 2 ** 31;

/** Bytes. */
const MAX_KEPT = 2 ** 30;

/** Bytes: a bit for each page of 4 GiB, which the addon insists on. */
const DIRTY_LOG_SIZE = 2 ** 32 / PAGE_SIZE / 8;

/** Guest RAM below and above the MMIO hole, in pieces of at most 2 GiB. */
export function ramRanges(size: number): { gpa: number; size: number }[] {
  const low = Math.min(size, layout.mmioHoleStart);
  const ranges: { gpa: number; size: number }[] = [];
  for (const [start, length] of [
    [0, low],
    [layout.mmioHoleEnd, size - low],
  ] as const) {
    for (let done = 0; done < length; done += MAX_REGION) {
      ranges.push({ gpa: start + done, size: Math.min(MAX_REGION, length - done) });
    }
  }
  return ranges;
}

/** A file with guest RAM: every region one after the other, or the pages that changed since the layer before. */
export interface MemoryLayer {
  /** Open for reading; the mapping outlives it. */
  readonly fd: number;
  /** First page and number of pages of each piece that the layer has, in order; undefined: all of RAM. */
  readonly extents: readonly (readonly [page: number, count: number])[] | undefined;
  /** The file is this machine's alone: it is written in place, so that nothing is in memory twice. */
  readonly exclusive?: boolean;
}

/** What RAM begins as: zeros, unless it says more. */
export interface RamContents {
  /** Files, the oldest first. */
  readonly layers?: readonly MemoryLayer[];
  /** Has a source give the pages. @param regions all of RAM in order, each with its offset. */
  readonly attach?: ((regions: readonly (readonly [offset: number, mapping: Mapping])[]) => PageFaults) | undefined;
}

/**
 * Guest RAM and its memory slots: anonymous host memory, or files mapped copy-on-write, of which nothing is read before
 * it is touched, or memory whose pages a source gives. Pages exist once they are touched.
 */
export class GuestRam implements Disposable {
  /**
   * Whether memory of a machine is kept for the next one on this thread, emptied: V8 collects garbage for each new buffer
   * of that size.
   */
  static keep = false;
  static #kept: Mapping | undefined;
  readonly memory: GuestMemory;
  /** What backs it, by guest physical address: for I/O without a copy. The index is that of the memory slot. */
  readonly regions: (readonly [gpa: number, mapping: Mapping])[] = [];
  readonly #vm: VmFd;
  readonly #faults: PageFaults | undefined;
  #dirtyLog: Uint8Array | undefined;

  /** @throws MemoryError when the host refuses, SnapshotError when it has no such faults. */
  constructor(vm: VmFd, size: number, { layers = [], attach }: RamContents = {}) {
    this.#vm = vm;
    const protection = PROT_READ | PROT_WRITE;
    const [base, ...later] = layers;
    const flags = (base?.exclusive ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE | (base ? 0 : MAP_ANONYMOUS);
    try {
      let offset = 0;
      const regions = ramRanges(size).map((range, slot) => {
        const map = () => mapMemory(range.size, protection, flags, base?.fd ?? -1, 'mapping guest memory', offset);
        const mapping = (base ? undefined : GuestRam.#takeKept(range.size)) ?? map();
        this.regions.push([range.gpa, mapping]);
        if (!base && !attach) mapping.advise(MADV_HUGEPAGE); // a hint: where the host has none, small pages do
        for (const layer of later) mapLayer(mapping, offset, layer);
        vm.setUserMemoryRegion(slot, range.gpa, mapping.buffer);
        offset += range.size;
        return { gpa: range.gpa, buffer: mapping.buffer };
      });
      if (attach) {
        let start = 0;
        const faults = attach(
          this.regions.map(([, mapping]) => {
            start += mapping.buffer.byteLength;
            return [start - mapping.buffer.byteLength, mapping];
          }),
        );
        this.#faults = faults;
        this.memory = new PagedMemory(regions, () => faults.check());
      } else this.memory = new GuestMemory(regions);
    } catch (error) {
      this[Symbol.dispose]();
      if (!(error instanceof Error && 'ioctl' in error && error.ioctl === 'mmap')) throw error;
      const message = `memory: the host has no ${size} bytes for this machine; give it less`;
      throw new MemoryError(message, { cause: error });
    }
  }

  /**
   * Gives RAM that nobody has touched its contents. @returns whether it can: files that are written in place and sources
   * need RAM that is made for them. @throws SnapshotError
   */
  fill({ layers = [], attach }: RamContents): boolean {
    if (attach || layers[0]?.exclusive) return false;
    let offset = 0;
    for (const [, mapping] of this.regions) {
      for (const layer of layers) mapLayer(mapping, offset, layer);
      offset += mapping.buffer.byteLength;
    }
    return true;
  }

  static #keepFor(mapping: Mapping): boolean {
    if (!GuestRam.keep || GuestRam.#kept || mapping.buffer.byteLength > MAX_KEPT || mapping.renew() < 0) return false;
    GuestRam.#kept = mapping;
    return true;
  }

  /** What was kept, if it is as large. */
  static #takeKept(size: number): Mapping | undefined {
    const mapping = GuestRam.#kept;
    GuestRam.#kept = undefined;
    if (mapping?.buffer.byteLength === size) return mapping;
    mapping?.unmap();
    return undefined;
  }

  /** Calls back, now or later on this thread, when every page is there. Those that are not yet are asked for. */
  whenWhole(callback: () => void): void {
    if (this.#faults) this.#faults.whenWhole(callback);
    else callback();
  }

  /** For after anybody but `memory` has read RAM. @throws SnapshotError when that may not be what the guest wrote. */
  check(): void {
    this.#faults?.check();
  }

  /** Number of pages. */
  get pages(): number {
    return this.memory.size / PAGE_SIZE;
  }

  /** Whether takeDirtyPages() knows of every page that was written since it was called last. */
  get tracksDirtyPages(): boolean {
    return this.#dirtyLog !== undefined;
  }

  /** Begins to note which pages are written, by the vCPUs and by devices, or stops it. */
  trackDirtyPages(on: boolean): void {
    if (on === this.tracksDirtyPages) return;
    this.regions.forEach(([gpa, { buffer }], slot) => {
      this.#vm.setUserMemoryRegion(slot, gpa, buffer, on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
    });
    this.#dirtyLog = on ? new Uint8Array(DIRTY_LOG_SIZE) : undefined;
    if (on) this.memory.trackWrites();
    else this.memory.ignoreWrites();
  }

  /**
   * The pages that were written since the last call, which are forgotten.
   * @param into a byte for each page in the order of the regions: gets 1 for those, others stay as they are.
   */
  takeDirtyPages(into: Uint8Array): void {
    const log = this.#dirtyLog;
    if (!log) throw new Error('dirty pages are not tracked');
    let first = 0;
    this.regions.forEach(([gpa, { buffer }], slot) => {
      const pages = buffer.byteLength / PAGE_SIZE;
      const part = into.subarray(first, first + pages);
      log.fill(0, 0, Math.ceil(pages / 8));
      this.#vm.takeDirtyLog(slot, log);
      for (let i = 0; i < pages / 8; i++) {
        for (let bits = log[i] as number, page = 8 * i; bits !== 0; bits >>= 1, page++) if (bits & 1) part[page] = 1;
      }
      this.memory.takeWrites(gpa, part);
      first += pages;
    });
  }

  /**
   * Writes RAM to a file, region after region: all of it, with holes for pages of zeros, or some pages at their places.
   * @param pages a byte for each page, not 0 for those wanted. @returns bytes written, or -errno. @throws SnapshotError
   */
  save(fd: number, pages?: Uint8Array): number {
    let offset = 0;
    let total = 0;
    for (const [, mapping] of this.regions) {
      const { byteLength } = mapping.buffer;
      const first = offset / PAGE_SIZE;
      const written = pages
        ? mapping.savePages(fd, offset, pages.subarray(first, first + byteLength / PAGE_SIZE))
        : mapping.savePages(fd, offset);
      if (written < 0) return written;
      total += written;
      offset += byteLength;
    }
    this.check();
    return total;
  }

  [Symbol.dispose](): void {
    this.#faults?.[Symbol.dispose]();
    this.memory?.revoke();
    for (const [, mapping] of this.regions) if (!GuestRam.#keepFor(mapping)) mapping.unmap();
    this.regions.length = 0;
  }
}

/** Maps what a layer has of a region over what is there. @param start offset of the region in the file. */
function mapLayer(mapping: Mapping, start: number, { fd, extents }: MemoryLayer): void {
  const end = start + mapping.buffer.byteLength;
  for (const [page, count] of extents ?? [[start / PAGE_SIZE, mapping.buffer.byteLength / PAGE_SIZE]]) {
    const from = Math.max(start, page * PAGE_SIZE);
    const to = Math.min(end, (page + count) * PAGE_SIZE);
    if (from >= to) continue;
    const result = mapping.mapOver(from - start, to - from, fd, from);
    if (result >= 0) continue;
    const remedy = 'take a full one, or raise vm.max_map_count';
    throw new SnapshotError(`snapshot: mapping the pages of a differential one: ${errnoName(-result)}; ${remedy}`);
  }
}
