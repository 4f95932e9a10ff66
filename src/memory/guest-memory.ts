/** A contiguous piece of guest RAM and the host bytes behind it. */
export interface MemoryRegion {
  /** Guest physical address of its first byte; a multiple of 4096. */
  readonly gpa: number;
  readonly buffer: ArrayBuffer;
}

/** An access to guest physical memory that no region holds. Guests can cause it; callers decide what it means. */
export class GuestMemoryRangeError extends Error {
  constructor(gpa: number, length: number) {
    super(`no guest memory at 0x${gpa.toString(16)}..0x${(gpa + length).toString(16)}`);
    this.name = 'GuestMemoryRangeError';
  }
}

/** Up to so many bytes a loop is faster than a view for set(). */
const SMALL = 32;

/** log2 of the size of a page. */
const PAGE_SHIFT = 12;

class Region {
  readonly gpa: number;
  readonly size: number;
  /** A byte for each page, 1 where it was written; undefined while nobody asks. */
  written: Uint8Array | undefined;
  readonly bytes: Uint8Array;
  readonly view: DataView;

  constructor({ gpa, buffer }: MemoryRegion) {
    this.gpa = gpa;
    this.size = buffer.byteLength;
    if (!(gpa >= 0) || !Number.isSafeInteger(gpa + this.size)) throw new RangeError(`no guest memory region at ${gpa}`);
    this.bytes = new Uint8Array(buffer);
    this.view = new DataView(buffer);
  }

  /** @param at from the region's start. @param length more than 0. */
  mark(at: number, length: number): void {
    if (this.written) this.written.fill(1, at >>> PAGE_SHIFT, ((at + length - 1) >>> PAGE_SHIFT) + 1);
  }
}

/**
 * The guest's RAM by guest physical address. Every access is bounds-checked; one that is not wholly inside RAM throws
 * GuestMemoryRangeError and changes nothing. Regions that touch read as one. All integers are little-endian. Addresses
 * are plain numbers, so the last one is below 2^53.
 */
export class GuestMemory {
  readonly #regions: Region[];
  #last: Region;
  /** For integers that straddle two regions. */
  readonly #scratch = new DataView(new ArrayBuffer(8));

  /** @param regions at least one; they must not overlap. */
  constructor(regions: readonly MemoryRegion[]) {
    this.#regions = regions.map((r) => new Region(r)).sort((a, b) => a.gpa - b.gpa);
    const first = this.#regions[0];
    if (!first) throw new RangeError('guest memory needs a region');
    for (let i = 1; i < this.#regions.length; i++) {
      const [before, after] = [this.#regions[i - 1] as Region, this.#regions[i] as Region];
      if (before.gpa + before.size > after.gpa) throw new RangeError('guest memory regions overlap');
    }
    this.#last = first;
  }

  /** @internal Holds no memory from now on: every access throws. */
  revoke(): void {
    this.#regions.length = 0;
    this.#last = new Region({ gpa: 0, buffer: new ArrayBuffer(0) });
  }

  /** Guest RAM in bytes. */
  get size(): number {
    return this.#regions.reduce((sum, r) => sum + r.size, 0);
  }

  /** The regions in address order. */
  get ranges(): { gpa: number; size: number }[] {
    return this.#regions.map(({ gpa, size }) => ({ gpa, size }));
  }

  /** Whether every byte of the range is RAM; an empty range is if its address is. Only whole numbers are addresses. */
  contains(gpa: number, length: number): boolean {
    if (!Number.isSafeInteger(gpa) || !Number.isSafeInteger(length) || length < 0) return false;
    let at = gpa;
    const end = gpa + length;
    do {
      const region = this.#find(at);
      if (!region) return false;
      at = region.gpa + region.size;
    } while (at < end);
    return true;
  }

  /**
   * A live view of RAM, taken to be written now. The range must lie in one region: those that may straddle use read and
   * write.
   */
  slice(gpa: number, length: number): Uint8Array {
    const region = this.#whole(gpa, length);
    if (!region || !Number.isInteger(length) || length < 0) throw new GuestMemoryRangeError(gpa, length);
    if (length > 0) region.mark(gpa - region.gpa, length);
    return region.bytes.subarray(gpa - region.gpa, gpa - region.gpa + length);
  }

  /** Copies RAM out; any regions. */
  read(gpa: number, into: Uint8Array): void {
    const { length } = into;
    const region = length <= SMALL ? this.#whole(gpa, length) : undefined;
    if (region) {
      const at = gpa - region.gpa;
      for (let i = 0; i < length; i++) into[i] = region.bytes[at + i] as number;
      return;
    }
    this.#each(gpa, into.length, (part, offset) => into.set(part, offset));
  }

  /** Copies into RAM; any regions. */
  write(gpa: number, data: Uint8Array): void {
    const { length } = data;
    const region = length <= SMALL ? this.#whole(gpa, length) : undefined;
    if (region) {
      const at = gpa - region.gpa;
      for (let i = 0; i < length; i++) region.bytes[at + i] = data[i] as number;
      if (region.written && length > 0) region.mark(at, length);
      return;
    }
    this.#each(gpa, data.length, (part, offset) => part.set(data.subarray(offset, offset + part.length)));
    this.noteWrite(gpa, data.length);
  }

  /** Sets a range to zero. */
  zero(gpa: number, length: number): void {
    this.#each(gpa, length, (part) => part.fill(0));
    this.noteWrite(gpa, length);
  }

  /** A byte. @throws GuestMemoryRangeError where there is no memory. */
  readU8(gpa: number): number {
    const region = this.#whole(gpa, 1);
    if (!region) throw new GuestMemoryRangeError(gpa, 1);
    return region.view.getUint8(gpa - region.gpa);
  }

  /** Two bytes, little-endian. @throws GuestMemoryRangeError where there is no memory. */
  readU16(gpa: number): number {
    const region = this.#whole(gpa, 2);
    if (region) return region.view.getUint16(gpa - region.gpa, true);
    return this.#gather(gpa, 2).getUint16(0, true);
  }

  /** Four bytes, little-endian. @throws GuestMemoryRangeError where there is no memory. */
  readU32(gpa: number): number {
    const region = this.#whole(gpa, 4);
    if (region) return region.view.getUint32(gpa - region.gpa, true);
    return this.#gather(gpa, 4).getUint32(0, true);
  }

  /** Eight bytes, little-endian. @throws GuestMemoryRangeError where there is no memory. */
  readU64(gpa: number): bigint {
    const region = this.#whole(gpa, 8);
    if (region) return region.view.getBigUint64(gpa - region.gpa, true);
    return this.#gather(gpa, 8).getBigUint64(0, true);
  }

  /** A byte. @throws GuestMemoryRangeError where there is no memory. */
  writeU8(gpa: number, value: number): void {
    const region = this.#whole(gpa, 1);
    if (!region) throw new GuestMemoryRangeError(gpa, 1);
    region.view.setUint8(gpa - region.gpa, value);
    if (region.written) region.mark(gpa - region.gpa, 1);
  }

  /** Two bytes, little-endian. @throws GuestMemoryRangeError where there is no memory. */
  writeU16(gpa: number, value: number): void {
    const region = this.#whole(gpa, 2);
    if (region) {
      region.view.setUint16(gpa - region.gpa, value, true);
      if (region.written) region.mark(gpa - region.gpa, 2);
    } else {
      this.#scratch.setUint16(0, value, true);
      this.#scatter(gpa, 2);
    }
  }

  /** Four bytes, little-endian. @throws GuestMemoryRangeError where there is no memory. */
  writeU32(gpa: number, value: number): void {
    const region = this.#whole(gpa, 4);
    if (region) {
      region.view.setUint32(gpa - region.gpa, value, true);
      if (region.written) region.mark(gpa - region.gpa, 4);
    } else {
      this.#scratch.setUint32(0, value, true);
      this.#scatter(gpa, 4);
    }
  }

  /** Eight bytes, little-endian. @throws GuestMemoryRangeError where there is no memory. */
  writeU64(gpa: number, value: bigint): void {
    const region = this.#whole(gpa, 8);
    if (region) {
      region.view.setBigUint64(gpa - region.gpa, value, true);
      if (region.written) region.mark(gpa - region.gpa, 8);
    } else {
      this.#scratch.setBigUint64(0, value, true);
      this.#scatter(gpa, 8);
    }
  }

  /** From now on the pages that are written through this object are noted; what was noted before is forgotten. */
  trackWrites(): void {
    for (const region of this.#regions) region.written = new Uint8Array(Math.ceil(region.size / 2 ** PAGE_SHIFT));
  }

  /** Undoes trackWrites(). */
  ignoreWrites(): void {
    for (const region of this.#regions) region.written = undefined;
  }

  /**
   * The pages of a region that were written since the last call, a byte each, which are forgotten.
   * @param gpa of the region's start. @param into gets 1 for each; others stay as they are.
   */
  takeWrites(gpa: number, into: Uint8Array): void {
    const written = this.#regions.find((region) => region.gpa === gpa)?.written;
    if (!written) return;
    for (let page = written.indexOf(1); page >= 0; page = written.indexOf(1, page + 1)) into[page] = 1;
    written.fill(0);
  }

  /** Somebody else has written there: the host's kernel. What is not RAM does not count. */
  noteWrite(gpa: number, length: number): void {
    if (!this.#last.written || length <= 0) return;
    for (const region of this.#regions) {
      const start = Math.max(gpa, region.gpa);
      const end = Math.min(gpa + length, region.gpa + region.size);
      if (start < end) region.mark(start - region.gpa, end - start);
    }
  }

  #find(gpa: number): Region | undefined {
    const last = this.#last;
    if (gpa >= last.gpa && gpa < last.gpa + last.size) return last;
    for (const region of this.#regions) {
      if (gpa >= region.gpa && gpa < region.gpa + region.size) {
        this.#last = region;
        return region;
      }
    }
    return undefined;
  }

  /** The region that holds all of the range; undefined if none does. */
  #whole(gpa: number, length: number): Region | undefined {
    const region = this.#find(gpa);
    if (!region || !Number.isInteger(gpa) || gpa - region.gpa + length > region.size) return undefined;
    return region;
  }

  #gather(gpa: number, length: number): DataView {
    this.read(gpa, new Uint8Array(this.#scratch.buffer, 0, length));
    return this.#scratch;
  }

  #scatter(gpa: number, length: number): void {
    this.write(gpa, new Uint8Array(this.#scratch.buffer, 0, length));
  }

  #each(gpa: number, length: number, visit: (part: Uint8Array, offset: number) => void): void {
    if (!this.contains(gpa, length)) throw new GuestMemoryRangeError(gpa, length);
    for (let done = 0; done < length; ) {
      const region = this.#find(gpa + done) as Region;
      const start = gpa + done - region.gpa;
      const part = region.bytes.subarray(start, Math.min(region.size, start + length - done));
      visit(part, done);
      done += part.length;
    }
  }
}
