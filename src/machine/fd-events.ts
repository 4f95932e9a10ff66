import { errnoName, TsvisorError } from '../errors.js';
import { addon, type RunHost } from '../kvm/addon.js';
import { EPOLLIN } from '../kvm/generated/abi.js';

/** What the run loop waits for beside the vCPU, mostly descriptors: each has a token and a handler on the machine thread. */
export class FdEvents {
  readonly #host: RunHost;
  readonly #handlers: ((() => void) | undefined)[] = [];
  readonly #tokens = new Map<number, number>();

  constructor(host: RunHost) {
    this.#host = host;
  }

  /** For what a thread of the addon reports without a descriptor. @param make makes it, given where it is to report to. */
  addSource<T>(handler: () => void, make: (host: RunHost, token: number) => T): { source: T; remove: () => void } {
    const token = this.#allocate(handler);
    const remove = () => {
      this.#handlers[token] = undefined;
    };
    return { source: make(this.#host, token), remove };
  }

  /**
   * Registers a descriptor. @returns a function that asks for one event (a mask of EPOLLIN, EPOLLOUT) and may be called
   * again from the handler; error and hang-up are always reported. A handler may be called once too often.
   */
  add(fd: number, handler: () => void): (events: number) => void {
    const token = this.#allocate(handler);
    this.#tokens.set(fd, token);
    return (events) => {
      const result = this.#host.watch(fd, token, events);
      if (result < 0) throw new TsvisorError('ERR_INTERNAL', `epoll on descriptor ${fd}: ${errnoName(-result)}`);
    };
  }

  /** Forgets a descriptor; before it is closed. */
  remove(fd: number): void {
    const token = this.#tokens.get(fd);
    if (token === undefined) return;
    this.#host.unwatch(fd); // fails where it was never armed: as good
    this.#handlers[token] = undefined;
    this.#tokens.delete(fd);
  }

  dispatch(token: number): void {
    this.#handlers[token]?.();
  }

  #allocate(handler: () => void): number {
    const free = this.#handlers.indexOf(undefined);
    const token = free < 0 ? this.#handlers.length : free;
    this.#handlers[token] = handler;
    return token;
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
