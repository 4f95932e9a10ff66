import { addon } from '../kvm/addon.js';
import { EPOLLIN, EPOLLOUT } from '../kvm/generated/abi.js';
import type { FdEvents } from '../machine/fd-events.js';
import type { Segments } from '../virtio/segments.js';
import { type GuestIo, IoOperation } from './guest-io.js';

/** Of a terminal, in characters. */
export interface ConsoleSize {
  readonly rows: number;
  readonly columns: number;
}

/** More than a queue of Linux' buffers of 32 KiB. */
const MAX_REST = 4 << 20;
/** Of one piece of output, for the tail. */
const MAX_KEPT = 16 * 1024;
const NOTHING = new Uint8Array();

/** Sees a console's output on its way. */
export interface OutputTail {
  put(byte: number): void;
}
const EAGAIN = 11;
/** Offset that makes GuestIo read and write streams. */
const STREAM = -1;

/**
 * The machine's end of a console port's socket, and what the host says of the port. Bytes go between the socket and guest
 * memory without a stop: what the socket does not take stays with the guest, what the guest has no room for stays in the
 * socket. It outlives the guest's resets.
 */
export class PortStream {
  readonly name: string;
  /** Whether it is a terminal (hvc) and not a plain port. */
  readonly console: boolean;
  /** Of the terminal at the host's end; 0 by 0 while nobody has said. */
  size: ConsoleSize = { rows: 0, columns: 0 };
  readonly #fd: number;
  #watch: (events: number) => void;
  /** Gets what is written, too. */
  tail: OutputTail | undefined;
  readonly #byte = new Uint8Array(1);
  /** The events waited for; undefined when none are, not even the end of the other side. */
  #awaited: number | undefined;
  #inputEnded = false;
  #outputGone = false;
  #rest: Uint8Array = NOTHING;

  /** Called after wait(), when reading or writing may get on; perhaps once too often. */
  onReady: () => void = () => {};
  onResize: () => void = () => {};
  /** Gives what the guest has still to write, at most so many bytes. */
  onEnd: (most: number) => Uint8Array = () => NOTHING;

  /** @param fd non-blocking; stays the caller's. */
  constructor(name: string, console: boolean, fd: number, events: FdEvents) {
    this.name = name;
    this.console = console;
    this.#fd = fd;
    this.#watch = events.add(fd, () => this.#ready());
  }

  /** Whether no byte will ever come or go any more: the other side is closed and all that it sent was read. */
  get closed(): boolean {
    return this.#inputEnded && this.#outputGone;
  }

  /** Whether all input has been read that will ever be. */
  get inputEnded(): boolean {
    return this.#inputEnded;
  }

  /** Whether nobody will ever read output: the guest must not wait for it. */
  get outputGone(): boolean {
    return this.#outputGone;
  }

  /** Moves input into guest memory. @returns bytes; 0 when there is none now, or none any more. */
  read(io: GuestIo, into: Segments): number {
    if (this.#inputEnded) return 0;
    const count = io.transfer(IoOperation.read, this.#fd, STREAM, into, 0);
    if (count > 0) return count;
    if (count !== -EAGAIN) {
      this.#inputEnded = true;
      this.#probe();
    }
    return 0;
  }

  /** Moves output from guest memory. @returns bytes; fewer than all when the socket is full or nobody reads any more. */
  write(io: GuestIo, from: Segments): number {
    if (this.#outputGone) return 0;
    const count = io.transfer(IoOperation.write, this.#fd, STREAM, from, 0);
    if (count < 0 && count !== -EAGAIN) this.#outputGone = true;
    if (this.tail && count > 0) this.#keep(this.tail, from, count);
    return Math.max(0, count);
  }

  /** One byte of output, lost if the socket is full. */
  writeByte(byte: number): void {
    this.#byte[0] = byte;
    addon.write(this.#fd, this.#byte, 0, 1);
    this.tail?.put(byte);
  }

  /** Asks for one onReady() when there is input, or room for output, as told; the end of the other side always counts. */
  wait(forInput: boolean, forOutput: boolean): void {
    const events = (forInput ? EPOLLIN : 0) | (forOutput ? EPOLLOUT : 0);
    // Once the other side is gone epoll reports just that, for ever: there may only be input to read to its end.
    if (events === this.#awaited || (this.#outputGone && !(events & EPOLLIN))) return;
    this.#awaited = events;
    this.#watch(events);
  }

  resize(size: ConsoleSize): void {
    this.size = size;
    this.onResize();
  }

  /** The guest has ended: takes what it has still to write, for drain(). */
  end(): void {
    this.#rest = this.onEnd(MAX_REST);
    for (const byte of this.#rest) this.tail?.put(byte);
  }

  /**
   * Its device is gone, and what was waited for for it. Writes what end() took: `drained` follows, when the reader has
   * taken it or is gone.
   */
  drain(events: FdEvents): void {
    this.#watch = events.add(this.#fd, () => this.#writeRest());
    this.#writeRest();
  }

  #writeRest(): void {
    while (!this.drained) {
      const count = addon.write(this.#fd, this.#rest, 0, this.#rest.length);
      if (count === -EAGAIN) {
        this.#watch(EPOLLOUT);
        return;
      }
      this.#rest = count < 0 ? NOTHING : this.#rest.subarray(count);
    }
  }

  get drained(): boolean {
    return this.#rest.length === 0;
  }

  #ready(): void {
    if (this.#awaited === 0) this.#probe(); // no read and no write will tell
    this.#awaited = undefined;
    this.onReady();
  }

  #keep(tail: OutputTail, from: Segments, count: number): void {
    const bytes = new Uint8Array(Math.min(count, MAX_KEPT));
    from.read(count - bytes.length, bytes);
    for (const byte of bytes) tail.put(byte);
  }

  /** A write of nothing fails when nobody can read. */
  #probe(): void {
    if (addon.write(this.#fd, this.#byte, 0, 0) < 0) this.#outputGone = true;
  }
}
