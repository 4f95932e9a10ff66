import { constants } from 'node:os';
import { addon } from '../kvm/addon.js';
import type { FdEvents } from '../machine/fd-events.js';
import type { SendResult } from '../virtio/net/backend.js';
import type { Segments } from '../virtio/segments.js';
import { LENGTH_SIZE, putFrameLength } from './frame-stream-format.js';
import { type GuestIo, IoOperation } from './guest-io.js';
import { Readiness } from './readiness.js';

const { EAGAIN } = constants.errno;

/** Lengths of messages in bytes, without the word before each. */
export interface MessageLimits {
  /** Of the header that send() takes from the host's memory. */
  readonly header: number;
  /** Shortest and longest message that may be received; the longest is also that for send(). */
  readonly shortest: number;
  readonly longest: number;
}

/**
 * A device's end of a non-blocking stream socket to the main thread: messages behind their length, as
 * frame-stream-format.ts says. Bodies go between the socket and guest memory. It outlives a guest's reset.
 */
export class MessageStream implements Disposable {
  /** receive() may find something; asked for by awaitReadable(). May be called without cause, as the others. */
  onReadable = () => {};
  /** send() may not be full any more; asked for by awaitWritable(). */
  onWritable = () => {};
  /** `up` is false now. */
  onDown = () => {};
  readonly #fd: number;
  readonly #limits: MessageLimits;
  readonly #readiness: Readiness;
  #up = true;
  /** What was read: whole messages, then the beginning of one. Room for two: a long one is moved at most once. */
  readonly #in: Uint8Array;
  #inStart = 0;
  #inEnd = 0;
  /** The last read took all there was. */
  #drained = false;
  readonly #prefix: Uint8Array;
  /** What the socket did not take of a message that it took the beginning of. */
  readonly #out: Uint8Array;
  #outStart = 0;
  #outEnd = 0;
  /** Goes out after what is in #out, before any message that is sent. */
  #announcement: Uint8Array | undefined;

  /** @param fd stays its opener's. */
  constructor(fd: number, events: FdEvents, limits: MessageLimits) {
    this.#fd = fd;
    this.#limits = limits;
    this.#in = new Uint8Array(2 * (LENGTH_SIZE + limits.longest));
    this.#out = new Uint8Array(LENGTH_SIZE + limits.longest);
    this.#prefix = new Uint8Array(LENGTH_SIZE + limits.header);
    this.#readiness = new Readiness(
      fd,
      events,
      () => this.onReadable(),
      () => {
        if (this.#flush()) this.onWritable();
        else this.awaitWritable();
      },
    );
  }

  /** Whether there is another end still. It never comes back. */
  get up(): boolean {
    return this.#up;
  }

  /** Sends a few bytes, their length word included, before any other message. Takes the place of one not yet sent. */
  protected announce(message: Uint8Array): void {
    this.#announcement = message;
    if (!this.#flush()) this.awaitWritable();
  }

  /** @param io of the guest whose memory holds the body. */
  send(io: GuestIo, header: Uint8Array, body: Segments): SendResult {
    if (!this.#flush()) return 'full';
    if (!this.#up) return 'refused';
    const prefix = this.#prefix;
    const length = prefix.length + body.length;
    putFrameLength(prefix, 0, length - LENGTH_SIZE);
    prefix.set(header, LENGTH_SIZE);
    const written = io.transfer(IoOperation.write, this.#fd, -1, body, 0, prefix);
    if (written === length) return 'taken';
    if (written === -EAGAIN) return 'full';
    if (written < 0) {
      this.#down();
      return 'refused';
    }
    this.#outStart = written;
    this.#outEnd = length;
    if (written < prefix.length) this.#out.set(prefix.subarray(written), written);
    const sent = Math.max(0, written - prefix.length);
    body.read(sent, this.#out.subarray(prefix.length + sent, length));
    this.awaitWritable();
    return 'taken';
  }

  awaitWritable(): void {
    if (this.#up) this.#readiness.awaitWritable();
  }

  /** The next message, or undefined when there is none now. It may be changed, and is valid until the next call. */
  receive(): Uint8Array | undefined {
    const { shortest, longest } = this.#limits;
    while (this.#up) {
      const have = this.#inEnd - this.#inStart;
      const length = have < LENGTH_SIZE ? 0 : this.#messageLength();
      // A length that cannot be is a defect of the other side: nothing after it has a meaning.
      if (have >= LENGTH_SIZE && (length < shortest || length > longest)) {
        this.#down();
      } else if (have >= LENGTH_SIZE + length && have > 0) {
        const start = this.#inStart + LENGTH_SIZE;
        this.#inStart = start + length;
        return this.#in.subarray(start, start + length);
      } else if (!this.#fill()) {
        return undefined;
      }
    }
    return undefined;
  }

  awaitReadable(): void {
    this.#drained = false;
    if (this.#up) this.#readiness.awaitReadable();
  }

  [Symbol.dispose](): void {
    this.#readiness.close();
  }

  #messageLength(): number {
    const at = this.#inStart;
    const bytes = this.#in;
    return (
      (bytes[at] as number) * 2 ** 24 +
      (((bytes[at + 1] as number) << 16) | ((bytes[at + 2] as number) << 8) | (bytes[at + 3] as number))
    );
  }

  /** @returns whether there is more in #in. */
  #fill(): boolean {
    if (this.#drained) return false;
    if (this.#inEnd === this.#inStart) {
      this.#inStart = this.#inEnd = 0;
    } else if (this.#inStart > this.#in.length / 2) {
      this.#in.copyWithin(0, this.#inStart, this.#inEnd);
      this.#inEnd -= this.#inStart;
      this.#inStart = 0;
    }
    const room = this.#in.length - this.#inEnd;
    const count = addon.read(this.#fd, this.#in, this.#inEnd, room);
    if (count > 0) {
      this.#inEnd += count;
      this.#drained = count < room;
      return true;
    }
    this.#drained = true;
    if (count !== -EAGAIN) this.#down();
    return false;
  }

  /** Writes what is to be sent before the next message. @returns whether that is done. */
  #flush(): boolean {
    while (this.#up) {
      if (this.#outStart === this.#outEnd) {
        if (this.#announcement === undefined) break;
        this.#out.set(this.#announcement);
        this.#outStart = 0;
        this.#outEnd = this.#announcement.length;
        this.#announcement = undefined;
      }
      const count = addon.write(this.#fd, this.#out, this.#outStart, this.#outEnd - this.#outStart);
      if (count >= 0) this.#outStart += count;
      else if (count === -EAGAIN) return false;
      else this.#down();
    }
    return true;
  }

  #down(): void {
    this.#up = false;
    this.#outStart = this.#outEnd = 0;
    this.onDown();
  }
}
