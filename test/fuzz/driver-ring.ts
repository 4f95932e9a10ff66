import type { GuestMemory } from '#dist/memory/guest-memory.js';

/** A descriptor as a driver writes it. */
export interface Descriptor {
  gpa: bigint;
  length: number;
  flags: number;
  next: number;
}

export interface RingPlacement {
  readonly index: number;
  readonly size: number;
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
}

/** What a request has until it is used. */
interface InUse {
  readonly descriptors: readonly number[];
  readonly buffers: readonly Descriptor[];
}

/** A queue as its driver believes it to be. */
export class DriverRing implements RingPlacement {
  readonly index: number;
  readonly size: number;
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  /** avail.idx, as far as the driver has written it. */
  availIndex = 0;
  readonly #guest: GuestMemory;
  readonly #eventIndex: boolean;
  readonly #free: number[];
  readonly #inUse = new Map<number, InUse>();
  #shown = 0;
  #lastUsed = 0;

  constructor(guest: GuestMemory, { index, size, descriptors, available, used }: RingPlacement, eventIndex: boolean) {
    this.#guest = guest;
    this.index = index;
    this.size = size;
    this.descriptors = descriptors;
    this.available = available;
    this.used = used;
    this.#eventIndex = eventIndex;
    this.#free = Array.from({ length: size }, (_, i) => i);
  }

  /** Chains that were made available and not used. */
  get inFlight(): number {
    return (this.availIndex - this.#guest.readU16(this.used + 2)) & 0xffff;
  }

  /** Takes back what was used. @returns free descriptors. */
  reclaim(): number[] {
    const end = this.#guest.readU16(this.used + 2);
    // After as many as there can be: the index may be anything.
    for (let n = 0; n < this.size && this.#lastUsed !== end; n++) {
      const head = this.#guest.readU32(this.used + 4 + 8 * (this.#lastUsed % this.size));
      this.#lastUsed = (this.#lastUsed + 1) & 0xffff;
      const done = this.#inUse.get(head);
      this.#inUse.delete(head);
      if (done) this.#free.push(...done.descriptors);
    }
    return this.#free;
  }

  /** Whether a range holds a buffer of a request that is in flight. */
  covers(gpa: bigint, length: number): boolean {
    for (const { buffers } of this.#inUse.values()) {
      if (buffers.some((one) => gpa < one.gpa + BigInt(one.length) && one.gpa < gpa + BigInt(length))) return true;
    }
    return false;
  }

  /** Writes descriptors of the table, or of another. */
  write(chain: readonly Descriptor[], at: readonly number[], table = this.descriptors): void {
    chain.forEach(({ gpa, length, flags, next }, i) => {
      const entry = table + 16 * (at[i] ?? i);
      if (!this.#guest.contains(entry, 16)) return;
      this.#guest.writeU64(entry, gpa);
      this.#guest.writeU32(entry + 8, length);
      this.#guest.writeU16(entry + 12, flags);
      this.#guest.writeU16(entry + 14, next);
    });
  }

  /** Puts a head into the next entry. */
  offer(head: number, descriptors: readonly number[], buffers: readonly Descriptor[]): void {
    this.#inUse.set(head, { descriptors, buffers });
    this.#guest.writeU16(this.available + 4 + 2 * (this.availIndex % this.size), head);
    this.availIndex = (this.availIndex + 1) & 0xffff;
  }

  /** Writes avail.idx. @returns whether the device is to be notified, by the words of section 2.7.10.1. */
  show(): boolean {
    this.#guest.writeU16(this.available + 2, this.availIndex);
    const event = this.#guest.readU16(this.used + 4 + 8 * this.size);
    let wanted = !this.#eventIndex && this.#shown !== this.availIndex && (this.#guest.readU16(this.used) & 1) === 0;
    for (; this.#shown !== this.availIndex; this.#shown = (this.#shown + 1) & 0xffff) {
      if (this.#eventIndex && this.#shown === event) wanted = true;
    }
    return wanted;
  }
}
