import { ByteFifo } from './byte-fifo.js';
import type { ByteSource, OneShotTimer } from './host.js';

/** The shortest and the longest rest between two refills, in microseconds. */
const MIN_REST = 50;
const MAX_REST = 20_000;

/** Guest time spent on emptying the FIFO is followed by a rest this many times as long. */
export const DEFAULT_REST_FACTOR = 2;

/**
 * The serial line towards a guest: takes bytes from the host's source and hands them to the receiver FIFO at a pace that
 * the guest can follow.
 *
 * A real line has a baud rate. Without one the FIFO would never be empty, and Linux's interrupt handler, which reads as
 * long as there is data (serial8250_rx_chars, up to 256 characters a pass, up to 512 passes), would starve the worker
 * that empties its 64 KiB flip buffer and then drop what does not fit. The rate here adapts to the guest: a FIFO that
 * took t to be emptied is refilled no sooner than `restFactor` × t later, so that the guest always has that share of its
 * time for what follows the interrupt (line discipline, echo, the program that reads).
 */
export class SerialInput {
  readonly #source: ByteSource;
  readonly #timer: OneShotTimer;
  readonly #now: () => number;
  readonly #restFactor: number;
  /** Bytes taken from the source that the guest has not seen. Together with the FIFO's never more than its capacity. */
  readonly #line = new Uint8Array(ByteFifo.CAPACITY);
  #lineLength = 0;
  #sourceEmpty = false;
  #filledAt = 0;
  #restUntil = 0;
  #armed = false;

  constructor(source: ByteSource, timer: OneShotTimer, now: () => number, restFactor: number) {
    this.#source = source;
    this.#timer = timer;
    this.#now = now;
    this.#restFactor = restFactor;
    this.#restUntil = now();
  }

  /** The source has bytes again. */
  sourceReady(): void {
    this.#sourceEmpty = false;
  }

  timerExpired(): void {
    this.#armed = false;
  }

  /**
   * Fills an empty FIFO, or arms the timer if the guest still rests.
   * @param room how many bytes the receiver holds: 16, or 1 without FIFO.
   * @returns whether the FIFO has bytes now.
   */
  fill(fifo: ByteFifo, room: number): boolean {
    if (this.#lineLength === 0 && this.#sourceEmpty) return false;
    const now = this.#now();
    const rest = this.#restUntil - now;
    if (rest > 0 && rest <= MAX_REST) {
      if (!this.#armed) {
        this.#armed = true;
        this.#timer.arm(Math.ceil(rest));
      }
      return false;
    }
    if (this.#lineLength === 0 && !this.#pull()) return false;
    const count = Math.min(room, this.#lineLength);
    for (let i = 0; i < count; i++) fifo.push(this.#line[i] as number);
    this.#line.copyWithin(0, count, this.#lineLength);
    this.#lineLength -= count;
    this.#filledAt = now;
    return true;
  }

  /** The guest has emptied the FIFO: its rest begins. */
  drained(): void {
    const now = this.#now();
    const rest = (now - this.#filledAt) * this.#restFactor;
    this.#restUntil = now + Math.min(MAX_REST, Math.max(MIN_REST, rest));
  }

  /** Takes what the guest has not read of the FIFO back onto the line, ahead of what is there, and empties the FIFO. */
  takeBack(fifo: ByteFifo): void {
    const count = fifo.length;
    if (count === 0) return;
    this.#line.copyWithin(count, 0, this.#lineLength);
    for (let i = 0; i < count; i++) this.#line[i] = fifo.shift();
    this.#lineLength += count;
    this.drained();
  }

  save(): number[] {
    return Array.from(this.#line.subarray(0, this.#lineLength));
  }

  /** @param line at most as many bytes as the FIFO that is restored with it leaves room for. */
  restore(line: readonly number[]): void {
    this.#lineLength = Math.min(line.length, ByteFifo.CAPACITY);
    for (let i = 0; i < this.#lineLength; i++) this.#line[i] = line[i] as number;
    this.#sourceEmpty = this.#armed = false;
    this.#filledAt = this.#restUntil = this.#now();
  }

  #pull(): boolean {
    const count = this.#source.read(this.#line);
    this.#lineLength = Math.max(0, Math.min(count, this.#line.length));
    this.#sourceEmpty = this.#lineLength < this.#line.length;
    return this.#lineLength > 0;
  }
}
