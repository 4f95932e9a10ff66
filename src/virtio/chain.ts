import type { GuestMemory } from '../memory/guest-memory.js';
import { VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE } from './generated/virtio.js';
import { Segments } from './segments.js';

/** Bytes of a descriptor: le64 address, le32 length, le16 flags, le16 next (virtio 1.2 section 2.7.5). */
export const DESCRIPTOR_SIZE = 16;
/** Most bytes of a chain (section 2.7.5.2): what is written to one is counted in 32 bits. */
const MAX_LENGTH = 2 ** 32;

/** What a driver did to a ring that makes it useless. */
export class BrokenRing extends Error {
  constructor(what: string) {
    super(what);
    this.name = 'BrokenRing';
  }
}

/**
 * One request of the driver: the memory that the device may read, then the memory that it may write. Each descriptor was
 * read once and checked; what the guest writes to the table since changes nothing here. Belongs to its queue, which
 * takes it back when it is pushed.
 */
export class DescriptorChain {
  /** Index of its first descriptor, by which the driver knows it. */
  head = 0;
  readonly readable: Segments;
  readonly writable: Segments;
  readonly #memory: GuestMemory;

  constructor(memory: GuestMemory) {
    this.#memory = memory;
    this.readable = new Segments(memory);
    this.writable = new Segments(memory);
  }

  /**
   * Reads the chain that starts at `head` (virtio 1.2 sections 2.7.5 to 2.7.5.3).
   * @param table guest physical address of the descriptor table, of `size` descriptors, all of it RAM.
   * @param limit most descriptors of a chain, indirect ones counted: what a loop of them ends at.
   * @throws BrokenRing
   */
  load(table: number, size: number, head: number, limit: number, indirectAllowed: boolean): void {
    this.head = head;
    this.readable.clear();
    this.writable.clear();
    let base = table;
    let count = size;
    let index = head;
    let indirect = false;
    for (let seen = 0; ; ) {
      if (index >= count) throw new BrokenRing(`descriptor ${index} of a table of ${count}`);
      const at = base + DESCRIPTOR_SIZE * index;
      const low = this.#memory.readU32(at);
      const gpa = this.#memory.readU32(at + 4) * 2 ** 32 + low;
      const length = this.#memory.readU32(at + 8);
      const last = this.#memory.readU32(at + 12);
      const flags = last & 0xffff;

      if (flags & VRING_DESC_F_INDIRECT) {
        // 2.7.5.3.1: not nested, and the last of its chain. 2.7.5.3.2: its WRITE flag says nothing.
        if (!indirectAllowed) throw new BrokenRing('an indirect descriptor, which was not negotiated');
        if (indirect) throw new BrokenRing('an indirect descriptor inside an indirect table');
        if (flags & VRING_DESC_F_NEXT) throw new BrokenRing('an indirect descriptor with a next one');
        if (length === 0 || length % DESCRIPTOR_SIZE !== 0)
          throw new BrokenRing(`an indirect table of ${length} bytes`);
        if (!this.#memory.contains(gpa, length)) throw new BrokenRing('an indirect table outside RAM');
        indirect = true;
        base = gpa;
        count = length / DESCRIPTOR_SIZE;
        index = 0;
        continue;
      }

      if (++seen > limit) throw new BrokenRing(`a chain of more than ${limit} descriptors`);
      if (length > 0) {
        if (!this.#memory.contains(gpa, length)) throw new BrokenRing('a buffer outside RAM');
        if (flags & VRING_DESC_F_WRITE) this.writable.add(gpa, length);
        else if (this.writable.count > 0) throw new BrokenRing('a readable buffer after a writable one');
        else this.readable.add(gpa, length);
        if (this.readable.length + this.writable.length > MAX_LENGTH)
          throw new BrokenRing('a chain of more than 4 GiB');
      }
      if (!(flags & VRING_DESC_F_NEXT)) return;
      index = last >>> 16;
    }
  }
}
