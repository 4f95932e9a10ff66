import { addon, type Mapping, type NativeGuestIo } from '../kvm/addon.js';
import { EPOLLIN } from '../kvm/generated/abi.js';
import type { FdEvents } from '../machine/fd-events.js';
import type { Segments } from '../virtio/segments.js';

/** Operations of the addon's GuestIo, by its numbers. */
export const IoOperation = { read: 0, write: 1, flush: 2, punchHole: 3, zeroRange: 4 } as const;
export type IoOperation = (typeof IoOperation)[keyof typeof IoOperation];

/** Who waits for an operation. */
export interface IoRequest {
  /** @param result bytes moved (fewer at the end of the file), 0, or -errno; -ECANCELED after cancel(). */
  ioDone(result: number): void;
}

/** Completions taken from the addon at a time. */
const BATCH = 64;
const NO_PAIRS = new Float64Array(0);

/**
 * I/O between host files and one machine's memory, without a copy: at once by transfer(), or on threads of the addon by
 * submit(), whose completions come back on the machine thread.
 */
export class GuestIo implements Disposable {
  readonly #native: NativeGuestIo;
  readonly #events: FdEvents;
  readonly #watch: (events: number) => void;
  readonly #waiting: (IoRequest | undefined)[] = [];
  readonly #freeTokens: number[] = [];
  readonly #completions = new Float64Array(2 * BATCH);
  readonly #batchListeners: (() => void)[] = [];
  #armed = false;

  constructor(regions: readonly (readonly [gpa: number, mapping: Mapping])[], events: FdEvents) {
    this.#native = new addon.GuestIo(regions);
    this.#events = events;
    this.#watch = events.add(this.#native.eventfd, () => this.#ready());
  }

  /** Called after each batch of completions: the time to publish used buffers. */
  onBatch(listener: () => void): void {
    this.#batchListeners.push(listener);
  }

  /**
   * One preadv2 or pwritev2 now; readv or writev where offset is negative.
   * @param flags RWF_NOWAIT to fail with -EAGAIN (or -EOPNOTSUPP) instead of waiting for a disk.
   * @param prefix bytes of the host before those of the guest.
   * @returns bytes moved, or -errno.
   */
  transfer(
    operation: typeof IoOperation.read | typeof IoOperation.write,
    fd: number,
    offset: number,
    segments: Segments,
    flags: number,
    prefix?: Uint8Array,
  ): number {
    const { pairs, count } = segments;
    if (prefix) return this.#native.transfer(operation, fd, offset, pairs, count, flags, prefix);
    return this.#native.transfer(operation, fd, offset, pairs, count, flags);
  }

  /**
   * Starts an operation on a thread. Its request's ioDone() is called later, never from here.
   * @param length of what flush, punchHole and zeroRange work on; reads and writes have their segments.
   */
  submit(
    request: IoRequest,
    operation: IoOperation,
    fd: number,
    offset: number,
    length: number,
    segments?: Segments,
  ): void {
    const token = this.#freeTokens.pop() ?? this.#waiting.length;
    this.#waiting[token] = request;
    const pairs = segments?.pairs ?? NO_PAIRS;
    const result = this.#native.submit(token, operation, fd, offset, length, pairs, segments?.count ?? 0);
    if (result < 0) {
      this.#release(token);
      throw new RangeError(`I/O on memory that the guest does not have (${result})`);
    }
    if (!this.#armed) {
      this.#armed = true;
      this.#watch(EPOLLIN);
    }
  }

  /** How many operations are under way. */
  get pending(): number {
    return this.#waiting.length - this.#freeTokens.length;
  }

  /** What has not begun completes soon, with -ECANCELED. */
  cancel(): void {
    this.#native.cancel();
  }

  /** Waits for operations that have begun; requests hear nothing any more. */
  [Symbol.dispose](): void {
    this.#events.remove(this.#native.eventfd);
    this.#native.close();
  }

  #ready(): void {
    this.#armed = false;
    for (;;) {
      const count = this.#native.completions(this.#completions);
      for (let i = 0; i < count; i++) {
        const token = this.#completions[2 * i] as number;
        const request = this.#waiting[token];
        this.#release(token);
        request?.ioDone(this.#completions[2 * i + 1] as number);
      }
      if (count < BATCH) break;
    }
    for (const listener of this.#batchListeners) listener();
    if (this.pending > 0 && !this.#armed) {
      this.#armed = true;
      this.#watch(EPOLLIN);
    }
  }

  #release(token: number): void {
    this.#waiting[token] = undefined;
    this.#freeTokens.push(token);
  }
}
