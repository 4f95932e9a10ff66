import type { GuestMemory } from '../memory/guest-memory.js';

/**
 * Pieces of guest memory that are one run of bytes to a device: the readable or the writable part of a descriptor chain,
 * or a cut of one. Whoever fills it has checked that every piece is RAM. Reused: adding allocates only to grow.
 */
export class Segments {
  readonly #memory: GuestMemory;
  /** Guest physical address and length of each piece, in pairs: what vectored I/O of the addon takes. */
  pairs = new Float64Array(16);
  /** Number of pieces. */
  count = 0;
  /** Bytes in all pieces. */
  length = 0;

  constructor(memory: GuestMemory) {
    this.#memory = memory;
  }

  clear(): void {
    this.count = 0;
    this.length = 0;
  }

  /** @param length more than 0; the range must be RAM. */
  add(gpa: number, length: number): void {
    const at = 2 * this.count++;
    if (at === this.pairs.length) {
      const grown = new Float64Array(2 * at);
      grown.set(this.pairs);
      this.pairs = grown;
    }
    this.pairs[at] = gpa;
    this.pairs[at + 1] = length;
    this.length += length;
  }

  /** Makes this the part of `whole` from `offset` on, at most `length` bytes long. */
  cut(whole: Segments, offset: number, length: number): void {
    this.clear();
    let skip = offset;
    let left = Math.max(0, Math.min(length, whole.length - offset));
    for (let i = 0; left > 0; i += 2) {
      const size = whole.pairs[i + 1] as number;
      if (skip >= size) {
        skip -= size;
        continue;
      }
      const take = Math.min(size - skip, left);
      this.add((whole.pairs[i] as number) + skip, take);
      left -= take;
      skip = 0;
    }
  }

  /** Copies bytes out from `offset` on. @returns how many there were. */
  read(offset: number, into: Uint8Array): number {
    return this.#copy(offset, into, false);
  }

  /** Copies bytes in from `offset` on. @returns how many there was room for. */
  write(offset: number, from: Uint8Array): number {
    return this.#copy(offset, from, true);
  }

  /** Sets every byte from `offset` on to zero. */
  zero(offset: number): void {
    let skip = offset;
    for (let i = 0; i < 2 * this.count; i += 2) {
      const size = this.pairs[i + 1] as number;
      if (skip < size) this.#memory.zero((this.pairs[i] as number) + skip, size - skip);
      skip = Math.max(0, skip - size);
    }
  }

  #copy(offset: number, bytes: Uint8Array, into: boolean): number {
    let skip = offset;
    let done = 0;
    for (let i = 0; i < 2 * this.count && done < bytes.length; i += 2) {
      const size = this.pairs[i + 1] as number;
      if (skip >= size) {
        skip -= size;
        continue;
      }
      const take = Math.min(size - skip, bytes.length - done);
      const part = take === bytes.length ? bytes : bytes.subarray(done, done + take);
      const gpa = (this.pairs[i] as number) + skip;
      if (into) this.#memory.write(gpa, part);
      else this.#memory.read(gpa, part);
      done += take;
      skip = 0;
    }
    return done;
  }
}
