import { GuestMemory } from '#dist/memory/guest-memory.js';

/** Guest RAM that counts accesses, and tells of every store of an integer before it is made. */
export class WatchedMemory extends GuestMemory {
  /** Accesses made since a test last set it. */
  accesses = 0;
  /** The accesses allowed: the next one throws. A loop without bound ends here. */
  budget = Number.POSITIVE_INFINITY;
  onStore: ((gpa: number, value: number) => void) | undefined;

  override contains(gpa: number, length: number): boolean {
    this.#count();
    return super.contains(gpa, length);
  }

  override slice(gpa: number, length: number): Uint8Array {
    this.#count();
    return super.slice(gpa, length);
  }

  override read(gpa: number, into: Uint8Array): void {
    this.#count();
    super.read(gpa, into);
  }

  override write(gpa: number, data: Uint8Array): void {
    this.#count();
    super.write(gpa, data);
  }

  override zero(gpa: number, length: number): void {
    this.#count();
    super.zero(gpa, length);
  }

  override readU16(gpa: number): number {
    this.#count();
    return super.readU16(gpa);
  }

  override readU32(gpa: number): number {
    this.#count();
    return super.readU32(gpa);
  }

  override writeU16(gpa: number, value: number): void {
    this.#count();
    this.onStore?.(gpa, value);
    super.writeU16(gpa, value);
  }

  override writeU32(gpa: number, value: number): void {
    this.#count();
    this.onStore?.(gpa, value);
    super.writeU32(gpa, value);
  }

  #count(): void {
    if (++this.accesses > this.budget) throw new Error(`more than ${this.budget} accesses to guest memory`);
  }
}
