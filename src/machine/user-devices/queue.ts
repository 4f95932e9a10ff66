import type { Chain, Queue, WritableBuffers } from '../../device/virtio-device.js';
import type { StateReader } from '../../state-reader.js';
import type { DescriptorChain } from '../../virtio/chain.js';
import type { Virtqueue } from '../../virtio/queue.js';
import type { Segments } from '../../virtio/segments.js';

/**
 * A virtqueue for a user's device: what the device does wrong throws, and what it does too late, after a reset, does
 * nothing. The chains of a Virtqueue are used again once they are pushed; those of this are not.
 */
export class UserQueue implements Queue {
  readonly #queue: Virtqueue;
  /** Chains that the device has. */
  readonly #out = new Set<DescriptorChain>();
  /** Heads of those that it had when its machine was saved, and has not popped again. */
  #again: number[] = [];
  #over = false;

  constructor(queue: Virtqueue) {
    this.#queue = queue;
  }

  /** Whether chains of it still have their memory. */
  get alive(): boolean {
    return !this.#over && this.#queue.alive;
  }

  get size(): number {
    return this.alive ? this.#queue.size : 0;
  }

  /** The guest's memory goes. */
  close(): void {
    this.#over = true;
  }

  pop(): Chain | undefined {
    if (!this.alive) return undefined;
    const head = this.#again.shift();
    const chain = head === undefined ? this.#queue.pop() : this.#queue.popAgain(head);
    if (!chain) return undefined;
    this.#out.add(chain);
    return new UserChain(this, chain);
  }

  push(chain: Chain, written: number): void {
    if (!(chain instanceof UserChain)) throw new TypeError('push: not a chain of this queue');
    if (!chain.queue.alive) return;
    if (chain.queue !== this) throw new Error('push: a chain of another queue');
    const { length } = chain.writable;
    if (!(Number.isInteger(written) && written >= 0 && written <= length)) {
      throw new RangeError(`push: ${written} bytes written to a chain that has room for ${length}`);
    }
    const own = chain.giveBack();
    this.#out.delete(own);
    this.#queue.push(own, written);
  }

  publish(): void {
    if (this.alive) this.#queue.publish();
  }

  /** Which chains the device has, in the order in which it got them. */
  save(): { readonly kept: readonly number[] } {
    return { kept: this.alive ? [...Array.from(this.#out, ({ head }) => head), ...this.#again] : [] };
  }

  /** The device gets them again, before all others. @throws SnapshotError when they cannot be as many as they are. */
  restore(state: StateReader): void {
    const { size, nextAvailable, nextUsed } = this.#queue.state;
    const kept = state.numbers('kept', this.size, 0, size - 1);
    const count = this.alive ? (nextAvailable - nextUsed) & 0xffff : 0;
    if (kept.length !== count) state.refuse('kept', `are ${kept.length} chains where the device has ${count}`);
    this.#again = kept;
  }
}

class UserChain implements Chain {
  readonly queue: UserQueue;
  readonly readable: UserBuffers;
  readonly writable: UserBuffers;
  #chain: DescriptorChain | undefined;

  constructor(queue: UserQueue, chain: DescriptorChain) {
    this.queue = queue;
    this.#chain = chain;
    this.readable = new UserBuffers(this, chain.readable);
    this.writable = new UserBuffers(this, chain.writable);
  }

  get alive(): boolean {
    return this.#chain !== undefined && this.queue.alive;
  }

  giveBack(): DescriptorChain {
    const chain = this.#chain;
    if (!chain) throw new Error('push: the chain was given back already');
    this.#chain = undefined;
    return chain;
  }
}

class UserBuffers implements WritableBuffers {
  readonly #chain: UserChain;
  readonly #segments: Segments;

  constructor(chain: UserChain, segments: Segments) {
    this.#chain = chain;
    this.#segments = segments;
  }

  get length(): number {
    return this.#chain.alive ? this.#segments.length : 0;
  }

  read(offset: number, into: Uint8Array): number {
    checkOffset(offset);
    return this.#chain.alive ? this.#segments.read(offset, into) : 0;
  }

  write(offset: number, from: Uint8Array): number {
    checkOffset(offset);
    return this.#chain.alive ? this.#segments.write(offset, from) : 0;
  }
}

function checkOffset(offset: number): void {
  if (!Number.isSafeInteger(offset) || offset < 0) throw new RangeError(`offset ${offset} is not a whole number`);
}
