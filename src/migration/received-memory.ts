import { errnoName, MigrationError } from '../errors.js';
import { addon, type Mapping } from '../kvm/addon.js';
import { MAP_SHARED, PROT_READ, PROT_WRITE } from '../kvm/generated/abi.js';
import { mapMemory } from '../kvm/kvm.js';
import { type MemoryLayer, ramRanges } from '../machine/guest-ram.js';
import { PAGE_SIZE } from '../machine/layout.js';
import { MAX_BATCH_DATA, MAX_BATCH_PAGES } from '../machine/page-batches.js';
import { violation } from './channel.js';

/** Guest memory that comes from another process, which may send anything; in a file without a name. */
export class ReceivedMemory implements Disposable {
  #fd: number;
  readonly #pages: number;
  readonly #regions: { readonly first: number; readonly mapping: Mapping }[] = [];
  /** A byte for each page, 1 where it may not be all zeros. */
  readonly #filled: Uint8Array;
  /** Pages of a round come in ascending order: the next is this one, or a later one. */
  #next = 0;
  /** Of this round. */
  #count = 0;
  /** Whether every page was there once. */
  #complete = false;

  /** @param size bytes. @throws MemoryError, MigrationError */
  constructor(size: number) {
    this.#pages = size / PAGE_SIZE;
    this.#filled = new Uint8Array(this.#pages);
    this.#fd = addon.memfdCreate('tsvisor-guest', size);
    if (this.#fd < 0) throw new MigrationError(`the host has no memory for the machine: ${errnoName(-this.#fd)}`);
    try {
      let offset = 0;
      for (const range of ramRanges(size)) {
        const purpose = 'mapping memory of a machine to come';
        const mapping = mapMemory(range.size, PROT_READ | PROT_WRITE, MAP_SHARED, this.#fd, purpose, offset);
        this.#regions.push({ first: offset / PAGE_SIZE, mapping });
        offset += range.size;
      }
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** Takes a batch of PageSource. @throws MigrationError for one that is not as it must be; then all is lost. */
  take(batch: Buffer): void {
    const count = batch.length < 4 ? 0 : batch.readUInt32LE(0);
    if (count === 0 || count > MAX_BATCH_PAGES || batch.length < 4 + 4 * count)
      throw violation('a batch without pages');
    let from = 4 + 4 * count;
    for (let i = 0; i < count; i++) {
      const entry = batch.readUInt32LE(4 + 4 * i);
      const page = Math.floor(entry / 2);
      if (page < this.#next || page >= this.#pages)
        throw violation(`page ${page}, which is not the next or not in RAM`);
      this.#next = page + 1;
      this.#count++;
      if (entry % 2 === 0) {
        if (this.#filled[page]) this.#at(page).fill(0);
        this.#filled[page] = 0;
        continue;
      }
      if (from + PAGE_SIZE > batch.length) throw violation('a page without its contents');
      this.#at(page).set(batch.subarray(from, from + PAGE_SIZE));
      this.#filled[page] = 1;
      from += PAGE_SIZE;
    }
    if (from !== batch.length || (from - 4 - 4 * count) / PAGE_SIZE > MAX_BATCH_DATA)
      throw violation('contents of no page');
  }

  /** The round is over. @throws MigrationError if the first had not every page. */
  round(): void {
    this.#complete ||= this.#count === this.#pages;
    if (!this.#complete) throw violation(`${this.#count} of ${this.#pages} pages`);
    this.#next = this.#count = 0;
  }

  /** What a machine begins with. The descriptor is this object's: it is disposed of when the machine has mapped it. */
  finish(): MemoryLayer {
    if (!this.#complete) throw violation('a machine without its memory');
    this.#unmap();
    return { fd: this.#fd, extents: undefined, exclusive: true };
  }

  [Symbol.dispose](): void {
    this.#unmap();
    if (this.#fd >= 0) addon.close(this.#fd);
    this.#fd = -1;
  }

  #unmap(): void {
    for (const { mapping } of this.#regions.splice(0)) mapping.unmap();
  }

  #at(page: number): Uint8Array {
    for (const { first, mapping } of this.#regions) {
      const at = (page - first) * PAGE_SIZE;
      if (at < mapping.buffer.byteLength) return new Uint8Array(mapping.buffer, at, PAGE_SIZE);
    }
    throw violation(`page ${page}, which is not in RAM`);
  }
}
