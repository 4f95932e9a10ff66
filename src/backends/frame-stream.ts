import { constants } from 'node:os';
import { addon } from '../kvm/addon.js';
import type { FdEvents } from '../machine/fd-events.js';
import type { NetBackend, SendResult } from '../virtio/net/backend.js';
import type { Segments } from '../virtio/segments.js';
import {
  encodeOffloads,
  LENGTH_SIZE,
  MAX_FRAME_LENGTH,
  NET_HEADER_SIZE,
  putFrameLength,
} from './frame-stream-format.js';
import { type GuestIo, IoOperation } from './guest-io.js';
import { Readiness } from './readiness.js';

const { EAGAIN } = constants.errno;
const MAX_MESSAGE = LENGTH_SIZE + MAX_FRAME_LENGTH;

/**
 * A network whose host side is at the other end of a non-blocking stream socket: on the main thread, the user-mode
 * network or a FramePort. Messages are those of frame-stream-format.ts.
 */
export class FrameStream implements NetBackend, Disposable {
  readonly offloads: number;
  readonly mtu = undefined;
  onReadable = () => {};
  onWritable = () => {};
  onDown = () => {};
  readonly #fd: number;
  readonly #readiness: Readiness;
  #up = true;
  /** What was read: whole frames, then the beginning of one. Room for two, so that a long frame is moved at most once. */
  readonly #in = new Uint8Array(2 * MAX_MESSAGE);
  #inStart = 0;
  #inEnd = 0;
  /** The last read took all there was. */
  #drained = false;
  readonly #prefix = new Uint8Array(LENGTH_SIZE + NET_HEADER_SIZE);
  /** What the socket did not take of a message that it took the beginning of. */
  readonly #out = new Uint8Array(MAX_MESSAGE);
  #outStart = 0;
  #outEnd = 0;
  /** What the guest accepts; none before anything is said of it. */
  #guestOffloads = 0;
  /** What is still to be told of the guest's offloads: after what is in #out, before any frame. */
  #announcement: number | undefined;

  /**
   * @param fd stays its opener's.
   * @param offloads what the other end and the guest may leave to each other.
   */
  constructor(fd: number, events: FdEvents, offloads: number) {
    this.#fd = fd;
    this.offloads = offloads;
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

  get up(): boolean {
    return this.#up;
  }

  setOffloads(offloads: number): void {
    if (offloads === this.#guestOffloads) return;
    this.#guestOffloads = this.#announcement = offloads; // the numbers are the same
    if (!this.#flush()) this.awaitWritable();
  }

  send(io: GuestIo, header: Uint8Array, frame: Segments): SendResult {
    if (!this.#flush()) return 'full';
    if (!this.#up) return 'refused';
    const prefix = this.#prefix;
    const length = prefix.length + frame.length;
    putFrameLength(prefix, 0, length - LENGTH_SIZE);
    prefix.set(header, LENGTH_SIZE);
    const written = io.transfer(IoOperation.write, this.#fd, -1, frame, 0, prefix);
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
    frame.read(sent, this.#out.subarray(prefix.length + sent, length));
    this.awaitWritable();
    return 'taken';
  }

  awaitWritable(): void {
    if (this.#up) this.#readiness.awaitWritable();
  }

  receive(): Uint8Array | undefined {
    while (this.#up) {
      const have = this.#inEnd - this.#inStart;
      const length = have < LENGTH_SIZE ? 0 : this.#frameLength();
      // A length that cannot be is a defect of the other side: nothing after it has a meaning.
      if (have >= LENGTH_SIZE && (length < NET_HEADER_SIZE || length > MAX_FRAME_LENGTH)) {
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

  #frameLength(): number {
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
    } else if (this.#inStart > MAX_MESSAGE) {
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

  /** Writes what is to be sent before the next frame. @returns whether that is done. */
  #flush(): boolean {
    while (this.#up) {
      if (this.#outStart === this.#outEnd) {
        if (this.#announcement === undefined) break;
        const message = encodeOffloads(this.#announcement);
        this.#announcement = undefined;
        this.#out.set(message);
        this.#outStart = 0;
        this.#outEnd = message.length;
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
