/**
 * A timer whose deadline moves with every segment: moving it later costs nothing, since the running timeout only looks at
 * the deadline when it fires.
 */
export class LazyTimer {
  readonly #fire: () => void;
  #deadline = Number.POSITIVE_INFINITY;
  #timeout: NodeJS.Timeout | undefined;
  #timeoutAt = 0;

  constructor(fire: () => void) {
    this.#fire = fire;
  }

  get armed(): boolean {
    return this.#deadline !== Number.POSITIVE_INFINITY;
  }

  /** Fires once, `delay` milliseconds from now, in place of what was set before. */
  set(delay: number): void {
    const now = performance.now();
    this.#deadline = now + delay;
    if (this.#timeout && this.#timeoutAt <= this.#deadline) return;
    this.#start(now);
  }

  /** Will not fire; the timeout is left to run out. */
  clear(): void {
    this.#deadline = Number.POSITIVE_INFINITY;
  }

  /** Leaves nothing behind. */
  dispose(): void {
    this.clear();
    clearTimeout(this.#timeout);
    this.#timeout = undefined;
  }

  #start(now: number): void {
    clearTimeout(this.#timeout);
    this.#timeoutAt = this.#deadline;
    this.#timeout = setTimeout(() => this.#elapsed(), this.#deadline - now);
  }

  #elapsed(): void {
    this.#timeout = undefined;
    if (!this.armed) return;
    const now = performance.now();
    if (this.#deadline - now >= 1) {
      this.#start(now);
      return;
    }
    this.clear();
    this.#fire();
  }
}
