import type { Counters } from './counters.js';

/** What all connections hold together, and the bound of it. */
export class TcpMemory {
  readonly #counters: Counters;
  readonly #limit: number;
  /** Called when there is room again. */
  onRoom: () => void = () => {};

  constructor(counters: Counters, limit: number) {
    this.#counters = counters;
    this.#limit = limit;
  }

  get free(): number {
    return Math.max(0, this.#limit - this.#counters.tcpBufferedNow);
  }

  take(count: number): void {
    this.#counters.tcpBufferedNow += count;
  }

  release(count: number): void {
    if (count === 0) return;
    this.#counters.tcpBufferedNow -= count;
    if (this.free > this.#limit / 64) this.onRoom();
  }
}
