import type { GuestMemory } from '#dist/memory/guest-memory.js';
import type { DescriptorChain } from '#dist/virtio/chain.js';
import { VRING_AVAIL_F_NO_INTERRUPT } from '#dist/virtio/generated/virtio.js';
import type { QueueState, Virtqueue } from '#dist/virtio/queue.js';
import type { Segments } from '#dist/virtio/segments.js';

export interface MonitorOptions {
  /** The guest's view of memory, which nobody watches. */
  readonly memory: GuestMemory;
  readonly eventIndex: boolean;
  /** Whether the used buffer notification is up. */
  readonly interrupted: () => boolean;
  /** A rule was broken. */
  readonly fail: (what: string) => void;
  readonly onPop: (chain: DescriptorChain) => void;
}

/**
 * Stands between a device and one of its queues, and compares what each does with what it should: chains are used once
 * and in the space that they have, the used ring goes on by what was pushed, and the driver is interrupted exactly when it
 * wants to be.
 */
export class QueueMonitor {
  readonly queue: Virtqueue;
  /** Chains that the device has, by the position at which they were popped. */
  readonly outstanding = new Map<DescriptorChain, number>();
  readonly #state: QueueState;
  readonly #options: MonitorOptions;
  readonly #pool = new Set<DescriptorChain>();
  #position = 0;
  #pushed: number;
  #published: number;

  constructor(queue: Virtqueue, options: MonitorOptions) {
    this.queue = queue;
    this.#options = options;
    this.#state = queue.state;
    this.#pushed = this.#published = this.#state.nextUsed;
    this.#wrap(queue.pop.bind(queue), queue.unpop.bind(queue));
    this.#wrapUsed(queue.push.bind(queue), queue.publish.bind(queue));
  }

  /** Whether the device may store there: the used ring, or a writable buffer of a chain that it has. */
  mayStore(gpa: number, length: number): boolean {
    const { used, size } = this.#state;
    if (this.queue.alive && gpa >= used && gpa + length <= used + 6 + 8 * size) return true;
    for (const chain of this.outstanding.keys()) if (within(chain.writable, gpa, length)) return true;
    return false;
  }

  /** Whether the device may read there: a readable buffer of a chain that it has. */
  mayRead(gpa: number, length: number): boolean {
    for (const chain of this.outstanding.keys()) if (within(chain.readable, gpa, length)) return true;
    return false;
  }

  #wrap(pop: Virtqueue['pop'], unpop: Virtqueue['unpop']): void {
    const { queue, outstanding } = this;
    const { fail, onPop } = this.#options;
    queue.pop = () => {
      const chain = pop();
      if (!chain) return undefined;
      if (outstanding.has(chain)) fail('a chain was popped that the device has');
      outstanding.set(chain, this.#position++);
      this.#pool.add(chain);
      if (outstanding.size > queue.size) fail(`the device has ${outstanding.size} chains of a queue of ${queue.size}`);
      if (this.#pool.size > queue.size) fail(`a queue of ${queue.size} made ${this.#pool.size} chains`);
      onPop(chain);
      return chain;
    };
    const popAgain = queue.popAgain.bind(queue);
    queue.popAgain = (head) => {
      const chain = popAgain(head);
      if (!chain) return undefined;
      if (outstanding.has(chain)) fail('a chain was popped again that the device has');
      outstanding.set(chain, Number.NaN); // never unpopped
      onPop(chain);
      return chain;
    };
    queue.unpop = (chain) => {
      if (queue.alive) {
        if (outstanding.get(chain) !== this.#position - 1) fail('a chain was unpopped that was not the last');
        this.#position--;
      }
      outstanding.delete(chain);
      unpop(chain);
    };
  }

  #wrapUsed(push: Virtqueue['push'], publish: Virtqueue['publish']): void {
    const { queue, outstanding } = this;
    const { memory, fail } = this.#options;
    const { used, size } = this.#state;
    queue.push = (chain, written) => {
      const { head } = chain;
      const room = chain.writable.length;
      if (queue.alive && !outstanding.has(chain)) fail('a chain was pushed that the device does not have');
      if (!(Number.isInteger(written) && written >= 0 && written <= room)) fail(`${written} bytes written of ${room}`);
      outstanding.delete(chain);
      const { alive } = queue;
      push(chain, written);
      if (!alive) return;
      const entry = used + 4 + 8 * (this.#pushed & (size - 1));
      this.#pushed = (this.#pushed + 1) & 0xffff;
      if (memory.readU32(entry) !== head || memory.readU32(entry + 4) !== written % 2 ** 32) fail('a wrong used entry');
    };
    queue.publish = () => {
      const { alive } = queue;
      const before = this.#options.interrupted();
      const first = this.#published;
      publish();
      if (!alive || this.#pushed === first) return;
      this.#published = this.#pushed;
      if (memory.readU16(used + 2) !== this.#pushed) fail('used.idx is not what was pushed');
      const wanted = this.#wantsInterrupt(first);
      if (this.#options.interrupted() !== (before || wanted))
        fail(`an interrupt was ${wanted ? 'missed' : 'unwanted'}`);
    };
  }

  /** By the words of sections 2.7.7.1 and 2.7.7.2, not by the formula of the implementation. */
  #wantsInterrupt(first: number): boolean {
    const { memory, eventIndex } = this.#options;
    const { available, size } = this.#state;
    if (!eventIndex) return (memory.readU16(available) & VRING_AVAIL_F_NO_INTERRUPT) === 0;
    const event = memory.readU16(available + 4 + 2 * size);
    for (let index = first; index !== this.#published; index = (index + 1) & 0xffff) if (index === event) return true;
    return false;
  }
}

/** Whether a range is inside one piece, or goes from its beginning on over pieces that follow each other in memory. */
export function within({ pairs, count }: Segments, gpa: number, length: number): boolean {
  for (let i = 0; i < 2 * count; i += 2) {
    const start = pairs[i] as number;
    if (gpa >= start && gpa + length <= start + (pairs[i + 1] as number)) return true;
  }
  return false;
}
