import { EPOLLIN, EPOLLOUT } from '../kvm/generated/abi.js';
import type { FdEvents } from '../machine/fd-events.js';

/**
 * Tells when a descriptor can be read or written, once for each time it is asked. May tell without cause: also on an
 * error or hang-up, which the next read or write shows.
 */
export class Readiness {
  readonly #fd: number;
  readonly #events: FdEvents;
  readonly #watch: (events: number) => void;
  #awaited = 0;

  constructor(fd: number, events: FdEvents, onReadable: () => void, onWritable: () => void) {
    this.#fd = fd;
    this.#events = events;
    this.#watch = events.add(fd, () => {
      const awaited = this.#awaited; // which of them it is was not told
      this.#awaited = 0;
      if (awaited & EPOLLIN) onReadable();
      if (awaited & EPOLLOUT) onWritable();
    });
  }

  awaitReadable(): void {
    this.#await(EPOLLIN);
  }

  awaitWritable(): void {
    this.#await(EPOLLOUT);
  }

  /** Before the descriptor is closed. */
  close(): void {
    this.#events.remove(this.#fd);
  }

  #await(event: number): void {
    this.#awaited |= event;
    this.#watch(this.#awaited);
  }
}
