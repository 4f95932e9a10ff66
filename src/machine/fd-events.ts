import { errnoName, TsvisorError } from '../errors.js';
import { addon, type RunHost } from '../kvm/addon.js';
import { EPOLLIN } from '../kvm/generated/abi.js';

/** Tokens that one call of watch() can carry. */
const MAX_TOKENS = 0x10000;

/** Who gets what next() tells of descriptors, on one machine thread. */
export class Tokens<Owner> {
  readonly #handlers: ((() => void) | undefined)[] = [];
  readonly #owners: (Owner | undefined)[] = [];
  readonly #free: number[] = [];

  /** Those that are in use. */
  get count(): number {
    return this.#handlers.length - this.#free.length;
  }

  /** @throws TsvisorError when the thread waits for as much as it can. */
  allocate(handler: () => void, owner?: Owner): number {
    const token = this.#free.pop() ?? this.#handlers.length;
    if (token === MAX_TOKENS) {
      throw new TsvisorError('ERR_INTERNAL', `a machine thread waits for at most ${MAX_TOKENS} descriptors`);
    }
    this.#handlers[token] = handler;
    this.#owners[token] = owner;
    return token;
  }

  release(token: number): void {
    this.#handlers[token] = this.#owners[token] = undefined;
    this.#free.push(token);
  }

  ownerOf(token: number): Owner | undefined {
    return this.#owners[token];
  }

  dispatch(token: number): void {
    this.#handlers[token]?.();
  }
}

/** What a machine waits for beside its vCPUs, mostly descriptors: each has a token and a handler on the machine thread. */
export class FdEvents<Owner = unknown> {
  readonly #host: RunHost;
  readonly #tokens: Tokens<Owner>;
  readonly #owner: Owner | undefined;
  /** Of descriptors, by descriptor. */
  readonly #watched = new Map<number, number>();
  readonly #sources = new Set<number>();

  constructor(host: RunHost, tokens: Tokens<Owner> = new Tokens(), owner?: Owner) {
    this.#host = host;
    this.#tokens = tokens;
    this.#owner = owner;
  }

  /** For what a thread of the addon reports without a descriptor. @param make makes it, given where it is to report to. */
  addSource<T>(handler: () => void, make: (host: RunHost, token: number) => T): { source: T; remove: () => void } {
    const token = this.#tokens.allocate(handler, this.#owner);
    this.#sources.add(token);
    const remove = () => {
      if (this.#sources.delete(token)) this.#tokens.release(token);
    };
    return { source: make(this.#host, token), remove };
  }

  /**
   * Registers a descriptor. @returns a function that asks for one event (a mask of EPOLLIN, EPOLLOUT) and may be called
   * again from the handler; error and hang-up are always reported. A handler may be called once too often.
   */
  add(fd: number, handler: () => void): (events: number) => void {
    const token = this.#tokens.allocate(handler, this.#owner);
    this.#watched.set(fd, token);
    return (events) => {
      const result = this.#host.watch(fd, token, events);
      if (result < 0) throw new TsvisorError('ERR_INTERNAL', `epoll on descriptor ${fd}: ${errnoName(-result)}`);
    };
  }

  /** Forgets a descriptor; before it is closed. */
  remove(fd: number): void {
    const token = this.#watched.get(fd);
    if (token === undefined) return;
    this.#host.unwatch(fd); // fails where it was never armed: as good
    this.#tokens.release(token);
    this.#watched.delete(fd);
  }

  dispatch(token: number): void {
    this.#tokens.dispatch(token);
  }

  /** Forgets everything. */
  close(): void {
    for (const fd of [...this.#watched.keys()]) this.remove(fd);
    for (const token of this.#sources) this.#tokens.release(token);
    this.#sources.clear();
  }
}

/** A one-shot timer on the machine thread. */
export class Timer {
  readonly #fd: number;
  readonly #events: FdEvents;
  readonly #watch: (events: number) => void;
  readonly #expirations = new Uint8Array(8);

  constructor(events: FdEvents, onExpired: () => void) {
    this.#events = events;
    this.#fd = addon.timerfdCreate();
    if (this.#fd < 0) throw new TsvisorError('ERR_INTERNAL', `timerfd_create: ${errnoName(-this.#fd)}`);
    this.#watch = events.add(this.#fd, () => {
      // Re-armed since: the event was for the earlier setting and the read finds nothing yet.
      if (addon.read(this.#fd, this.#expirations, 0, 8) > 0) onExpired();
      else this.#watch(EPOLLIN);
    });
  }

  /** @param microseconds 1 to 2^32 - 1 from now; replaces an earlier setting. */
  arm(microseconds: number): void {
    addon.timerfdSet(this.#fd, Math.max(1, microseconds));
    this.#watch(EPOLLIN);
  }

  /** Undoes arm(). */
  disarm(): void {
    addon.timerfdSet(this.#fd, 0);
  }

  close(): void {
    this.#events.remove(this.#fd);
    addon.close(this.#fd);
  }
}
