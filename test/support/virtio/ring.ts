import { GuestMemory } from '#dist/memory/guest-memory.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { type QueueOptions, type QueueState, Virtqueue } from '#dist/virtio/queue.js';

export const { VRING_DESC_F_NEXT: NEXT, VRING_DESC_F_WRITE: WRITE, VRING_DESC_F_INDIRECT: INDIRECT } = abi;

/** A descriptor as a test writes it. */
export interface Descriptor {
  /** A bigint where the address is no safe integer. */
  readonly gpa: number | bigint;
  readonly length: number;
  readonly flags?: number;
  readonly next?: number;
}

export interface RingOptions extends Partial<Omit<QueueOptions, 'interrupt' | 'broken'>> {
  /** Free-running index at which both rings start; 0 by default. */
  readonly start?: number;
  readonly memory?: GuestMemory;
}

/** Where a ring's test may put its buffers: behind the ring, to the end of 4 MiB of RAM. */
export const BUFFERS = 0x20_0000;
const RAM = 4 << 20;

/** A split virtqueue alone, without a transport: its driver's side is laid out by hand, byte for byte. */
export class Ring {
  readonly memory: GuestMemory;
  readonly state: QueueState;
  readonly queue: Virtqueue;
  interrupts = 0;
  readonly broken: string[] = [];
  /** avail.idx. */
  #available: number;

  constructor(size: number, { start = 0, memory, ...options }: RingOptions = {}) {
    this.memory = memory ?? new GuestMemory([{ gpa: 0, buffer: new ArrayBuffer(RAM) }]);
    const available = 0x1000 + 16 * size;
    const used = Math.ceil((available + 6 + 2 * size) / 4) * 4;
    this.state = { size, descriptors: 0x1000, available, used, nextAvailable: start, nextUsed: start };
    this.#available = start;
    this.availIndex = start;
    this.memory.writeU16(used + 2, start);
    this.queue = new Virtqueue(this.memory, this.state, {
      eventIndex: false,
      indirect: true,
      limit: size,
      ...options,
      interrupt: () => this.interrupts++,
      broken: (what) => this.broken.push(what),
    });
  }

  /** Writes a descriptor of the ring's table, or of another. */
  describe(index: number, { gpa, length, flags = 0, next = 0 }: Descriptor, table = this.state.descriptors): void {
    const at = table + 16 * index;
    this.memory.writeU64(at, BigInt(gpa));
    this.memory.writeU32(at + 8, length);
    this.memory.writeU16(at + 12, flags);
    this.memory.writeU16(at + 14, next);
  }

  /** Writes descriptors one after another from index 0 on, each the next of the one before it. */
  describeChain(descriptors: readonly Descriptor[], table = this.state.descriptors): void {
    descriptors.forEach((descriptor, i) => {
      const next = i < descriptors.length - 1 ? NEXT : 0;
      this.describe(i, { next: i + 1, ...descriptor, flags: (descriptor.flags ?? 0) | next }, table);
    });
  }

  /** Makes chains available. */
  offer(...heads: number[]): void {
    for (const head of heads) {
      this.memory.writeU16(this.state.available + 4 + 2 * (this.#available % this.state.size), head);
      this.#available = (this.#available + 1) & 0xffff;
    }
    this.availIndex = this.#available;
  }

  set availIndex(index: number) {
    this.memory.writeU16(this.state.available + 2, index);
  }

  set availFlags(flags: number) {
    this.memory.writeU16(this.state.available, flags);
  }

  set usedEvent(index: number) {
    this.memory.writeU16(this.state.available + 4 + 2 * this.state.size, index);
  }

  get availEvent(): number {
    return this.memory.readU16(this.state.used + 4 + 8 * this.state.size);
  }

  get usedFlags(): number {
    return this.memory.readU16(this.state.used);
  }

  get usedIndex(): number {
    return this.memory.readU16(this.state.used + 2);
  }

  /** The used element at a free-running index. */
  used(index: number): { id: number; length: number } {
    const at = this.state.used + 4 + 8 * (index % this.state.size);
    return { id: this.memory.readU32(at), length: this.memory.readU32(at + 4) };
  }

  /** Pops what must be there. */
  pop() {
    const chain = this.queue.pop();
    if (!chain) throw new Error(`nothing to pop: ${this.broken.join()}`);
    return chain;
  }

  /** Pops, pushes and publishes one chain that says how much was written. */
  use(written = 0): void {
    this.queue.push(this.pop(), written);
    this.queue.publish();
  }
}
