import type { ByteSink, ByteSource } from '../devices/host.js';
import { addon } from '../kvm/addon.js';
import { EPOLLIN, EPOLLOUT } from '../kvm/generated/abi.js';
import { type FdEvents, Timer } from '../machine/fd-events.js';

const CAPACITY = 4096;
/** How long output may wait for more to go with it, in microseconds: one system call a burst instead of one a byte. */
const GATHER = 1000;
const EAGAIN = 11;

/**
 * A byte device's host end: a non-blocking stream socket. Output is gathered and written in bursts; when the reader is
 * slow, write() refuses bytes until onWritable is called. Input is read only when asked for, so that the sender waits.
 */
export class ByteStream implements ByteSink, ByteSource {
  readonly #fd: number;
  #watch: (events: number) => void;
  readonly #timer: Timer;
  readonly #out = new Uint8Array(CAPACITY);
  #outLength = 0;
  #blocked = false; // a write met a full socket: EPOLLOUT is awaited
  #refused = false; // write() returned false since the last onWritable
  readonly #in = new Uint8Array(CAPACITY);
  #inStart = 0;
  #inEnd = 0;
  #wantInput = false;
  #inputEnded = false;
  #outputGone = false;

  /** Called when write() may succeed again, and when read() has something. */
  onWritable: () => void = () => {};
  onReadable: () => void = () => {};

  constructor(fd: number, events: FdEvents) {
    this.#fd = fd;
    this.#watch = events.add(fd, () => this.#ready());
    this.#timer = new Timer(events, () => this.flush());
  }

  /** @returns false when the byte was not taken. */
  write(byte: number): boolean {
    if (this.#outLength === CAPACITY) {
      this.flush();
      if (this.#outLength === CAPACITY) {
        this.#refused = true;
        return false;
      }
    }
    if (this.#outLength === 0 && !this.#blocked) this.#timer.arm(GATHER);
    this.#out[this.#outLength++] = byte;
    return true;
  }

  /** Writes what is gathered, as far as the socket takes it. */
  flush(): void {
    if (this.#outLength === 0 || this.#blocked) return;
    const written = this.#outputGone ? this.#outLength : addon.write(this.#fd, this.#out, 0, this.#outLength);
    if (written >= 0) {
      this.#out.copyWithin(0, written, this.#outLength);
      this.#outLength -= written;
    } else if (written !== -EAGAIN) {
      this.#outputGone = true; // nobody will ever read: the guest must not wait for it
      this.#outLength = 0;
    }
    if (this.#outLength > 0) {
      this.#blocked = true;
      this.#arm();
    }
    if (this.#refused && this.#outLength < CAPACITY) {
      this.#refused = false;
      this.onWritable();
    }
  }

  /** @returns how many bytes were stored; fewer than asked for when there are no more yet: onReadable follows. */
  read(into: Uint8Array): number {
    let stored = 0;
    while (stored < into.length) {
      if (this.#inStart === this.#inEnd) this.#fill();
      if (this.#inStart === this.#inEnd) break;
      const count = Math.min(into.length - stored, this.#inEnd - this.#inStart);
      for (let i = 0; i < count; i++) into[stored + i] = this.#in[this.#inStart + i] as number;
      this.#inStart += count;
      stored += count;
    }
    return stored;
  }

  /** Whether everything written has reached the socket. */
  get drained(): boolean {
    return this.#outLength === 0;
  }

  /**
   * Its device is gone, and what was waited for for it: `drained` follows, when the reader has taken what is left or is
   * gone.
   */
  drain(events: FdEvents): void {
    this.onWritable = this.onReadable = () => {};
    this.#watch = events.add(this.#fd, () => this.#ready());
    this.#blocked = this.#wantInput = false;
    this.flush();
  }

  close(): void {
    this.#timer.close();
  }

  #fill(): void {
    if (this.#inputEnded || this.#wantInput) return;
    const count = addon.read(this.#fd, this.#in, 0, CAPACITY);
    this.#inStart = 0;
    this.#inEnd = Math.max(0, count);
    if (count === -EAGAIN) {
      this.#wantInput = true;
      this.#arm();
    } else if (count <= 0) {
      this.#inputEnded = true;
    }
  }

  #arm(): void {
    this.#watch((this.#wantInput ? EPOLLIN : 0) | (this.#blocked ? EPOLLOUT : 0));
  }

  #ready(): void {
    const wasBlocked = this.#blocked;
    this.#blocked = false;
    if (wasBlocked) this.flush();
    if (this.#wantInput) {
      this.#wantInput = false;
      this.#fill();
      if (this.#inEnd > this.#inStart) this.onReadable();
    } else if (this.#blocked) {
      this.#arm();
    }
  }
}
