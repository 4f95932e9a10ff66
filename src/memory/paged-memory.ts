import { GuestMemory, type MemoryRegion } from './guest-memory.js';

/**
 * Guest memory of which some may not be there yet: an access waits for it. When it never comes, what was read is not what
 * the guest wrote, and nothing may be done with it.
 */
export class PagedMemory extends GuestMemory {
  readonly #check: () => void;

  /** @param check throws once what is read may be wrong; it is called after every read. */
  constructor(regions: readonly MemoryRegion[], check: () => void) {
    super(regions);
    this.#check = check;
  }

  override slice(gpa: number, length: number): Uint8Array {
    const view = super.slice(gpa, length);
    for (let at = 0; at < length; at += 4096 - ((gpa + at) % 4096)) super.readU8(gpa + at); // before who has the view
    this.#check();
    return view;
  }

  override read(gpa: number, into: Uint8Array): void {
    super.read(gpa, into);
    this.#check();
  }

  override readU8(gpa: number): number {
    const value = super.readU8(gpa);
    this.#check();
    return value;
  }

  override readU16(gpa: number): number {
    const value = super.readU16(gpa);
    this.#check();
    return value;
  }

  override readU32(gpa: number): number {
    const value = super.readU32(gpa);
    this.#check();
    return value;
  }

  override readU64(gpa: number): bigint {
    const value = super.readU64(gpa);
    this.#check();
    return value;
  }
}
