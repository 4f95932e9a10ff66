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

class Region {
  readonly gpa: number;
  readonly size: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;

  constructor({ gpa, buffer }: MemoryRegion) {
    this.gpa = gpa;
    this.size = buffer.byteLength;
    if (!(gpa >= 0) || !Number.isSafeInteger(gpa + this.size)) throw new RangeError(`no guest memory region at ${gpa}`);
    this.bytes = new Uint8Array(buffer);
    this.view = new DataView(buffer);
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

  /** A live view of RAM. The range must lie in one region: those that may straddle use read and write. */
  slice(gpa: number, length: number): Uint8Array {
    const region = this.#whole(gpa, length);
    if (!region || !Number.isInteger(length) || length < 0) throw new GuestMemoryRangeError(gpa, length);
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
      return;
    }
    this.#each(gpa, data.length, (part, offset) => part.set(data.subarray(offset, offset + part.length)));
  }

  /** Sets a range to zero. */
  zero(gpa: number, length: number): void {
    this.#each(gpa, length, (part) => part.fill(0));
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
  }

  /** Two bytes, little-endian. @throws GuestMemoryRangeError where there is no memory. */
  writeU16(gpa: number, value: number): void {
    const region = this.#whole(gpa, 2);
    if (region) {
      region.view.setUint16(gpa - region.gpa, value, true);
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
    } else {
      this.#scratch.setBigUint64(0, value, true);
      this.#scatter(gpa, 8);
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
