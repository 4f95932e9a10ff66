import { now } from './end.js';

/** Log lines that a guest can cause. */
export const WARNINGS_PER_MINUTE = 10;

/** So many of something a minute: for what a guest can cause. */
export class RateLimit {
  readonly #most: number;
  #left: number;
  #since = 0;

  constructor(perMinute: number) {
    this.#most = this.#left = perMinute;
  }

  /** @returns whether there may be one more. */
  take(): boolean {
    const time = now();
    if (time - this.#since > 60_000) {
      this.#since = time;
      this.#left = this.#most;
    }
    return this.#left-- > 0;
  }
}
