import { now } from './end.js';

const WARNINGS_PER_MINUTE = 10;

/** Limits log lines that a guest can cause as often as it likes. */
export class WarningLimit {
  #left = WARNINGS_PER_MINUTE;
  #since = 0;

  /** Whether one more may be written now. */
  allow(): boolean {
    const time = now();
    if (time - this.#since > 60_000) {
      this.#since = time;
      this.#left = WARNINGS_PER_MINUTE;
    }
    return this.#left-- > 0;
  }
}
