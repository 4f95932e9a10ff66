import { GuestMemory } from '#dist/memory/guest-memory.js';

/** Guest RAM that counts accesses, and tells of every store before it is made: a device's view of a test's memory. */
export class WatchedMemory extends GuestMemory {
  /** Accesses made, and bytes copied, since a test last set them. */
  accesses = 0;
  bytes = 0;
  /** The accesses and bytes allowed: one more throws. A loop without bound ends here. */
  budget = Number.POSITIVE_INFINITY;
  byteBudget = Number.POSITIVE_INFINITY;
  /** @param value of an integer. */
  onStore: ((gpa: number, length: number, value?: number) => void) | undefined;
  /** Of more than 4 bytes. */
  onRead: ((gpa: number, length: number) => void) | undefined;

  override contains(gpa: number, length: number): boolean {
    this.#count(0);
    return super.contains(gpa, length);
  }

  override slice(gpa: number, length: number): Uint8Array {
    this.#count(0);
    return super.slice(gpa, length);
  }

  override read(gpa: number, into: Uint8Array): void {
    this.#count(into.length);
    // An integer that straddles two regions comes by here, too.
    if (into.length > 4) this.onRead?.(gpa, into.length);
    super.read(gpa, into);
  }

  override write(gpa: number, data: Uint8Array): void {
    this.#count(data.length);
    this.onStore?.(gpa, data.length);
    super.write(gpa, data);
  }

  override zero(gpa: number, length: number): void {
    this.#count(length);
    this.onStore?.(gpa, length);
    super.zero(gpa, length);
  }

  override readU16(gpa: number): number {
    this.#count(0);
    return super.readU16(gpa);
  }

  override readU32(gpa: number): number {
    this.#count(0);
    return super.readU32(gpa);
  }

  override writeU16(gpa: number, value: number): void {
    this.#count(0);
    this.onStore?.(gpa, 2, value);
    super.writeU16(gpa, value);
  }

  override writeU32(gpa: number, value: number): void {
    this.#count(0);
    this.onStore?.(gpa, 4, value);
    super.writeU32(gpa, value);
  }

  #count(bytes: number): void {
    this.bytes += bytes;
    if (++this.accesses > this.budget) throw new Error(`more than ${this.budget} accesses to guest memory`);
    if (this.bytes > this.byteBudget) throw new Error(`more than ${this.byteBudget} bytes of guest memory copied`);
  }
}
