import type { GuestMemory } from '../memory/guest-memory.js';
import { BrokenRing, DESCRIPTOR_SIZE, DescriptorChain } from './chain.js';
import {
  VRING_AVAIL_ALIGN_SIZE,
  VRING_AVAIL_F_NO_INTERRUPT,
  VRING_DESC_ALIGN_SIZE,
  VRING_USED_ALIGN_SIZE,
} from './generated/virtio.js';

/** Where a driver put a queue, and how far the device has come in it. Addresses are guest physical. */
export interface QueueState {
  /** Number of descriptors; a power of two. */
  readonly size: number;
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  /** Free-running 16-bit indices: the next entry to take and the next to give. */
  readonly nextAvailable: number;
  readonly nextUsed: number;
}

/** What the driver and the transport agreed on, and where a queue's notifications go. */
export interface QueueOptions {
  readonly eventIndex: boolean;
  readonly indirect: boolean;
  /** Most descriptors a chain may have. */
  readonly limit: number;
  /** The driver is to be told of used buffers. */
  readonly interrupt: () => void;
  /** The driver broke the ring: nothing more is to be expected of it. */
  readonly broken: (what: string) => void;
}

/** A queue, to who polls it. */
export interface PolledQueue {
  /** There may be something in it. @param polled it was looked at: its driver has not notified. */
  work(polled: boolean): void;
  /** It is polled no more: has the driver notify. @returns whether there is something already, which it will not notify of. */
  awaitNotification(): boolean;
}

/** A queue's place with who polls it. */
export interface RingPoll {
  /**
   * There will be work once avail.idx is not `seen` any more. @returns false: it is not polled now, the driver is to notify.
   */
  await(seen: number): boolean;
  close(): void;
}

/** Looks at a device's queues while its driver runs, which need not notify then, and need not stop for it otherwise. */
export interface QueuePolling {
  /**
   * @param number of the queue. @param index guest physical address of its avail.idx, in RAM.
   * @returns undefined where it cannot.
   */
  attach(number: number, index: number, client: PolledQueue): RingPoll | undefined;
}

/** Says why the driver's placement of a queue cannot be; undefined when it can (virtio 1.2 sections 2.7, 2.7.1). */
export function queueProblem(memory: GuestMemory, state: QueueState, maximum: number): string | undefined {
  const { size, descriptors, available, used } = state;
  if (size === 0 || size > maximum || (size & (size - 1)) !== 0) return `a queue of ${size} descriptors`;
  const parts = [
    ['a descriptor table', descriptors, DESCRIPTOR_SIZE * size, VRING_DESC_ALIGN_SIZE],
    ['an available ring', available, 6 + 2 * size, VRING_AVAIL_ALIGN_SIZE],
    ['a used ring', used, 6 + 8 * size, VRING_USED_ALIGN_SIZE],
  ] as const;
  for (const [name, gpa, length, alignment] of parts) {
    if (gpa % alignment !== 0) return `${name} that is misaligned`;
    if (!memory.contains(gpa, length)) return `${name} outside RAM`;
  }
  return undefined;
}

const fenceWord = new Int32Array(1);

/** Stores before it are seen by the vCPUs before loads after it are done: x86 reorders only these two. */
function fence(): void {
  Atomics.exchange(fenceWord, 0, 0);
}

/**
 * The device's side of a split virtqueue (virtio 1.2 section 2.7). A device takes chains with pop(), gives them back in
 * any order with push(), and makes what it pushed visible with publish(), once a batch. A ring that the driver breaks
 * ends the queue: pop() finds nothing from then on and what is pushed goes nowhere.
 */
export class Virtqueue {
  readonly size: number;
  readonly #memory: GuestMemory;
  readonly #options: QueueOptions;
  readonly #descriptors: number;
  readonly #available: number;
  readonly #used: number;
  #nextAvailable: number;
  #nextUsed: number;
  /** used.idx as the driver sees it. */
  #published: number;
  /** avail.idx when it was last read. */
  #seen: number;
  #poll: RingPoll | undefined;
  #alive = true;
  /** Chains not in use. */
  readonly #free: DescriptorChain[] = [];

  /** @param state must have no queueProblem(). */
  constructor(memory: GuestMemory, state: QueueState, options: QueueOptions) {
    this.#memory = memory;
    this.#options = options;
    this.size = state.size;
    this.#descriptors = state.descriptors;
    this.#available = state.available;
    this.#used = state.used;
    this.#nextAvailable = this.#seen = state.nextAvailable;
    this.#nextUsed = this.#published = state.nextUsed;
  }

  /** Where the device has come to; of chains that it still has only their number, nextAvailable - nextUsed. */
  get state(): QueueState {
    return {
      size: this.size,
      descriptors: this.#descriptors,
      available: this.#available,
      used: this.#used,
      nextAvailable: this.#nextAvailable,
      nextUsed: this.#nextUsed,
    };
  }

  /** Whether the queue is still to be served. */
  get alive(): boolean {
    return this.#alive;
  }

  /** Ends the queue: its device was reset or its ring broken. */
  close(): void {
    this.#alive = false;
    this.#poll?.close();
    this.#poll = undefined;
  }

  /** From now on it may be polled when there is nothing to pop. @param number its own. @param work as PolledQueue's. */
  pollBy(polling: QueuePolling, number: number, work: (polled: boolean) => void): void {
    const client = { work, awaitNotification: () => this.#awaitNotification() };
    if (this.#alive) this.#poll = polling.attach(number, this.#available + 2, client);
  }

  /**
   * The next chain that the driver made available; undefined when there is none, and then the device is told of the next
   * one: by the driver, or by who polls the queue.
   */
  pop(): DescriptorChain | undefined {
    if (!this.#alive) return undefined;
    if (this.#nextAvailable === this.#seen && !this.#look()) return undefined;
    const entry = this.#available + 4 + 2 * (this.#nextAvailable & (this.size - 1));
    const chain = this.#load(this.#memory.readU16(entry));
    if (chain) this.#nextAvailable = (this.#nextAvailable + 1) & 0xffff;
    return chain;
  }

  /**
   * A chain that was popped, and not pushed, before its machine was saved.
   * @param head what it had. @returns undefined when the driver broke it since, which ends the queue.
   */
  popAgain(head: number): DescriptorChain | undefined {
    return this.#alive ? this.#load(head) : undefined;
  }

  /**
   * Has the driver notify the device of the next chain that it makes available, though there may be some already.
   * @returns a number that is another once it has.
   */
  awaitNext(): number {
    const index = this.#memory.readU16(this.#available + 2);
    if (this.#alive && this.#options.eventIndex) this.#memory.writeU16(this.#used + 4 + 8 * this.size, index);
    fence();
    return index;
  }

  /** Takes back the chain popped last: the next pop() gives it again. */
  unpop(chain: DescriptorChain): void {
    this.#free.push(chain);
    this.#nextAvailable = (this.#nextAvailable - 1) & 0xffff;
  }

  /**
   * Gives a chain back. @param written bytes stored from the start of its writable part (section 2.7.8.2). The chain is
   * the queue's again.
   */
  push(chain: DescriptorChain, written: number): void {
    if (!this.#alive) return;
    const entry = this.#used + 4 + 8 * (this.#nextUsed & (this.size - 1));
    this.#memory.writeU32(entry, chain.head);
    this.#memory.writeU32(entry + 4, written);
    this.#nextUsed = (this.#nextUsed + 1) & 0xffff;
    this.#free.push(chain);
  }

  /** Shows the driver all that was pushed, and interrupts it if it wants that (section 2.7.7). */
  publish(): void {
    if (!this.#alive || this.#nextUsed === this.#published) return;
    const before = this.#published;
    this.#published = this.#nextUsed;
    this.#memory.writeU16(this.#used + 2, this.#published);
    fence(); // the driver reads used.idx after it has asked for an interrupt
    if (this.#wantsInterrupt(before)) this.#options.interrupt();
  }

  #load(head: number): DescriptorChain | undefined {
    const chain = this.#free.pop() ?? new DescriptorChain(this.#memory);
    try {
      chain.load(this.#descriptors, this.size, head, this.#options.limit, this.#options.indirect);
      return chain;
    } catch (error) {
      if (!(error instanceof BrokenRing)) throw error;
      this.#break(error.message);
      return undefined;
    }
  }

  #wantsInterrupt(before: number): boolean {
    if (!this.#options.eventIndex) return !(this.#memory.readU16(this.#available) & VRING_AVAIL_F_NO_INTERRUPT);
    // used_event: interrupt when the entry of that index is among the new ones.
    const event = this.#memory.readU16(this.#available + 4 + 2 * this.size);
    return ((this.#published - event - 1) & 0xffff) < ((this.#published - before) & 0xffff);
  }

  /** Reads avail.idx. @returns whether there is something to pop. */
  #look(): boolean {
    if (this.#readIndex()) return true;
    if (!this.#alive || !this.#options.eventIndex || this.#poll?.await(this.#nextAvailable)) return false;
    return this.#awaitNotification() && this.#readIndex();
  }

  /** avail_event: a notification for the next entry, please. @returns whether it was added just before that was written. */
  #awaitNotification(): boolean {
    this.#memory.writeU16(this.#used + 4 + 8 * this.size, this.#nextAvailable);
    fence();
    return this.#memory.readU16(this.#available + 2) !== this.#nextAvailable;
  }

  #readIndex(): boolean {
    this.#seen = this.#memory.readU16(this.#available + 2);
    const waiting = (this.#seen - this.#nextAvailable) & 0xffff;
    // Every chain has a descriptor until the driver sees it used. This bounds what a device holds at a time, and what it
    // takes before it publishes.
    const exposed = waiting + ((this.#nextAvailable - this.#published) & 0xffff);
    if (exposed > this.size) {
      this.#break(`${exposed} chains available at a time in a queue of ${this.size}`);
      return false;
    }
    return waiting > 0;
  }

  #break(what: string): void {
    this.close();
    this.#options.broken(what);
  }
}
