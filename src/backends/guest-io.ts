import { addon, type Mapping, type NativeGuestIo } from '../kvm/addon.js';
import type { FdEvents } from '../machine/fd-events.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import type { Segments } from '../virtio/segments.js';
import { TransferOrder } from './transfer-order.js';

/**
 * Operations of the addon's GuestIo, by its numbers. On its threads a file has one write at a time, in which those that
 * follow one another go together; of direct writes (O_DIRECT) any number, for the disk to order.
 */
export const IoOperation = {
  read: 0,
  write: 1,
  flush: 2,
  punchHole: 3,
  zeroRange: 4,
  copy: 5,
  directWrite: 6,
} as const;
export type IoOperation = (typeof IoOperation)[keyof typeof IoOperation];

/** Who waits for an operation. */
export interface IoRequest {
  /** @param result bytes moved (fewer at the end of a file), 0, or -errno; -ECANCELED after cancel(). */
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
  readonly #order = new TransferOrder();
  readonly #memory: GuestMemory;
  readonly #removeSource: () => void;
  readonly #waiting: (IoRequest | undefined)[] = [];
  /** Where reads that are under way put their data, by token. */
  readonly #targets: (Segments | undefined)[] = [];
  readonly #freeTokens: number[] = [];
  readonly #source = new Float64Array(2);
  readonly #completions = new Float64Array(2 * BATCH);
  readonly #batchListeners: (() => void)[] = [];
  readonly #idleListeners: (() => void)[] = [];

  /** @param memory is told of what is read into it. */
  constructor(regions: readonly (readonly [gpa: number, mapping: Mapping])[], memory: GuestMemory, events: FdEvents) {
    this.#memory = memory;
    const { source, remove } = events.addSource(
      () => this.#ready(),
      (host, token) => new addon.GuestIo(regions, host, token, this.#order.words),
    );
    this.#native = source;
    this.#removeSource = remove;
  }

  /** Called after each batch of completions: the time to publish used buffers. */
  onBatch(listener: () => void): void {
    this.#batchListeners.push(listener);
  }

  /**
   * One preadv2 or pwritev2 now, of MAX_PIECES pieces at most; readv or writev where offset is negative.
   * @param flags RWF_NOWAIT to fail with -EAGAIN (or -EOPNOTSUPP) instead of waiting for a disk.
   * @param prefix of a write: bytes of the host before those of the guest, at most MAX_PREFIX.
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
    if (operation === IoOperation.read) this.#noteWrites(segments);
    this.#order.set(operation, fd, offset, flags, segments.pairs, segments.count, prefix);
    return this.#native.transfer();
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
    const pairs = segments?.pairs ?? NO_PAIRS;
    const token = this.#token(request);
    if (operation === IoOperation.read) this.#targets[token] = segments;
    this.#started(token, this.#native.submit(token, operation, fd, offset, length, pairs, segments?.count ?? 0));
  }

  /** As submit(): writes bytes of the host, of which a copy is taken now. */
  writeBytes(request: IoRequest, fd: number, offset: number, bytes: Uint8Array): void {
    const token = this.#token(request);
    const { write } = IoOperation;
    this.#started(token, this.#native.submit(token, write, fd, offset, bytes.length, NO_PAIRS, 0, bytes));
  }

  /** As submit(): copies bytes from one file to another. */
  copy(request: IoRequest, from: number, fromOffset: number, to: number, offset: number, length: number): void {
    this.#source[0] = from;
    this.#source[1] = fromOffset;
    const token = this.#token(request);
    this.#started(token, this.#native.submit(token, IoOperation.copy, to, offset, length, this.#source, 1));
  }

  /** How many operations are under way. */
  get pending(): number {
    return this.#waiting.length - this.#freeTokens.length;
  }

  /** Calls back, now or later on this thread, when no operation is under way. */
  whenIdle(listener: () => void): void {
    this.#idleListeners.push(listener);
    this.#tellIdle();
  }

  /** Those requests complete soon, with -ECANCELED where no thread has begun them. */
  cancel(unwanted: (request: IoRequest) => boolean): void {
    const tokens = this.#waiting.flatMap((request, token) => (request && unwanted(request) ? [token] : []));
    if (tokens.length > 0) this.#native.cancel(Float64Array.from(tokens));
  }

  /** Waits for operations that have begun; requests hear nothing any more. */
  [Symbol.dispose](): void {
    this.#native.close();
    this.#removeSource();
  }

  #ready(): void {
    for (;;) {
      const count = this.#native.completions(this.#completions);
      for (let i = 0; i < count; i++) {
        const token = this.#completions[2 * i] as number;
        const request = this.#waiting[token];
        const target = this.#targets[token];
        if (target) this.#noteWrites(target); // now, not before: until now its pages were being written
        this.#release(token);
        request?.ioDone(this.#completions[2 * i + 1] as number);
      }
      if (count < BATCH) break;
    }
    for (const listener of this.#batchListeners) listener();
    this.#tellIdle();
  }

  #tellIdle(): void {
    while (this.pending === 0) {
      const waiting = this.#idleListeners.shift();
      if (!waiting) return;
      waiting();
    }
  }

  #noteWrites({ pairs, count }: Segments): void {
    for (let i = 0; i < 2 * count; i += 2) this.#memory.noteWrite(pairs[i] as number, pairs[i + 1] as number);
  }

  #token(request: IoRequest): number {
    const token = this.#freeTokens.pop() ?? this.#waiting.length;
    this.#waiting[token] = request;
    return token;
  }

  #started(token: number, result: number): void {
    if (result >= 0) return;
    this.#release(token);
    throw new RangeError(`I/O on memory that the guest does not have (${result})`);
  }

  #release(token: number): void {
    this.#waiting[token] = this.#targets[token] = undefined;
    this.#freeTokens.push(token);
  }
}
