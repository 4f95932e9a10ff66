import type { GuestRam } from './guest-ram.js';
import { PAGE_SIZE } from './layout.js';

/** Pages that a batch has at most: with contents, and in all. */
export const MAX_BATCH_DATA = 255;
export const MAX_BATCH_PAGES = 4096;

const WORDS = PAGE_SIZE / 4;

/**
 * Guest memory, handed out in batches while the guest runs: all pages first, then round by round those that were written
 * meanwhile. Pages are numbered in the order of the regions. A batch is `u32 n`, then for each page of it in ascending
 * order `u32 page * 2 + (1 if it has contents, 0 if it is all zeros)`, then the contents; little-endian.
 */
export class PageBatches {
  /** Pages that are still to be given in this round. */
  remaining: number;
  readonly #ram: GuestRam;
  readonly #wasTracking: boolean;
  /** A byte for each page, 1 for those. */
  readonly #wanted: Uint8Array;
  readonly #regions: { readonly first: number; readonly bytes: Uint8Array; readonly words: Int32Array }[] = [];
  /** None is wanted before this one. */
  #at = 0;

  /** All pages, and from now on it is noted which are written. */
  constructor(ram: GuestRam) {
    this.#ram = ram;
    this.#wasTracking = ram.tracksDirtyPages;
    let first = 0;
    for (const [, { buffer }] of ram.regions) {
      this.#regions.push({ first, bytes: new Uint8Array(buffer), words: new Int32Array(buffer) });
      first += buffer.byteLength / PAGE_SIZE;
    }
    ram.trackDirtyPages(true);
    this.#wanted = new Uint8Array(ram.pages).fill(1);
    this.remaining = ram.pages;
  }

  /** Adds the pages that were written since the last round began, and goes on from the first. */
  round(): void {
    this.#ram.takeDirtyPages(this.#wanted);
    this.#at = 0;
    let remaining = 0;
    for (const wanted of this.#wanted) remaining += wanted;
    this.remaining = remaining;
  }

  /** The next batch. */
  take(): Uint8Array {
    const pages: number[] = [];
    let contents = 0;
    let page = this.#wanted.indexOf(1, this.#at);
    while (page >= 0 && pages.length < MAX_BATCH_PAGES && contents < MAX_BATCH_DATA) {
      this.#wanted[page] = 0;
      const zero = this.#isZero(page);
      pages.push(page * 2 + (zero ? 0 : 1));
      if (!zero) contents++;
      page = this.#wanted.indexOf(1, page + 1);
    }
    this.#at = page < 0 ? this.#wanted.length : page;
    this.remaining -= pages.length;
    const batch = new Uint8Array(4 + 4 * pages.length + contents * PAGE_SIZE);
    const numbers = new Uint32Array(batch.buffer, 0, 1 + pages.length);
    numbers[0] = pages.length;
    numbers.set(pages, 1);
    let to = numbers.byteLength;
    for (const entry of pages) {
      if (entry % 2 === 0) continue;
      const { bytes, at } = this.#locate((entry - 1) / 2);
      batch.set(bytes.subarray(at, at + PAGE_SIZE), to);
      to += PAGE_SIZE;
    }
    return batch;
  }

  /** Whatever is written is not noted any more, unless it was before. */
  end(): void {
    this.#ram.trackDirtyPages(this.#wasTracking);
  }

  #isZero(page: number): boolean {
    const { words, at } = this.#locate(page);
    const start = at / 4;
    for (let i = start; i < start + WORDS; i++) if (words[i] !== 0) return false;
    return true;
  }

  #locate(page: number) {
    for (const { first, bytes, words } of this.#regions) {
      const at = (page - first) * PAGE_SIZE;
      if (at < bytes.length) return { bytes, words, at };
    }
    throw new RangeError(`page ${page} is not in RAM`);
  }
}
