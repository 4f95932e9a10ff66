import type { Duplex } from 'node:stream';
import { ByteQueue } from '../byte-queue.js';
import type { TcpMemory } from './tcp-memory.js';
import { LINK_MSS, sequenceDifference } from './tcp-segments.js';
import type { Tuning } from './tuning.js';

/** The scale of the windows we advertise: up to 512 KiB. */
export const OUR_WINDOW_SCALE = 3;

/** The guest's data on its way to the host stream, and the window that tells the guest how much more may come. */
export class TcpReceiver {
  readonly #tuning: Tuning;
  readonly #memory: TcpMemory;
  readonly #queue = new ByteQueue();
  #stream: Duplex | undefined;
  /** Bytes that the stream has and that the host's kernel has not taken. */
  #writing = 0;
  /** Called when the stream has taken what it was given. */
  readonly #onTaken: () => void;
  /** The next sequence number expected, and the first one that the guest may not send yet. */
  #next = 0;
  #edge = 0;
  /** `next` of the last segment we sent. */
  #acknowledged = 0;
  #scale = 0;
  #finished = false;
  #ended = false;
  /** The window is smaller than it could be: all connections together hold too much. */
  #starved = false;

  constructor(tuning: Tuning, memory: TcpMemory, onTaken: () => void) {
    this.#tuning = tuning;
    this.#memory = memory;
    this.#onTaken = onTaken;
  }

  /** @param sequence the guest's first, that of its SYN. @param scaled whether both sides scale windows. */
  start(sequence: number, scaled: boolean): void {
    this.#next = this.#acknowledged = (sequence + 1) >>> 0;
    this.#edge = (this.#next + Math.min(65535, this.#tuning.receiveBuffer)) >>> 0;
    this.#scale = scaled ? OUR_WINDOW_SCALE : 0;
  }

  set stream(stream: Duplex) {
    this.#stream = stream;
  }

  get next(): number {
    return this.#next;
  }

  /** Bytes that the guest may send. */
  get window(): number {
    return sequenceDifference(this.#edge, this.#next);
  }

  /** The window field of a SYN, which is never scaled. */
  get synWindow(): number {
    return Math.min(65535, this.#tuning.receiveBuffer);
  }

  get unacknowledged(): number {
    return sequenceDifference(this.#next, this.#acknowledged);
  }

  /** Bytes that the host has not taken. */
  get held(): number {
    return this.#queue.length + this.#writing;
  }

  get starved(): boolean {
    return this.#starved;
  }

  /** Whether the guest's FIN came. */
  get finished(): boolean {
    return this.#finished;
  }

  /** Takes in-order data that begins at `next`. @returns how much of it: not what is beyond the window or the memory. */
  accept(bytes: Uint8Array, start: number, end: number): number {
    const count = Math.min(end - start, this.window, this.#memory.free);
    if (count <= 0) return 0;
    this.#queue.push(bytes.subarray(start, start + count));
    this.#memory.take(count);
    this.#next = (this.#next + count) >>> 0;
    return count;
  }

  /** The guest's FIN, in order. */
  finish(): void {
    this.#finished = true;
    this.#next = (this.#next + 1) >>> 0;
    if (this.window < 0) this.#edge = this.#next; // a FIN is taken even if the window is closed
  }

  /** Gives the stream what came, and its end. */
  flush(): void {
    const stream = this.#stream;
    if (!stream || this.#writing > 0 || this.#ended) return;
    const length = this.#queue.length;
    if (length > 0) {
      let left = length;
      this.#writing = length;
      stream.cork();
      this.#queue.read(0, length, (part) => {
        left -= part.length;
        stream.write(part, left === 0 ? this.#taken : undefined);
      });
      stream.uncork();
      this.#queue.consume(length);
      // Mostly the kernel has it already: then the window need not wait for the callback.
      if (stream.writableLength === 0) this.#release();
    }
    if (this.#finished) {
      this.#ended = true;
      stream.end();
    }
  }

  readonly #taken = (): void => {
    if (this.#writing === 0 || this.#stream?.writableLength !== 0) return; // of a write that was released at once
    this.#release();
    this.#onTaken();
  };

  #release(): void {
    const count = this.#writing;
    this.#writing = 0;
    this.#memory.release(count);
  }

  /** The largest right edge that we could advertise now. */
  #possibleEdge(): number {
    const { receiveBuffer } = this.#tuning;
    const own = receiveBuffer - this.held;
    this.#starved = this.#memory.free < Math.min(own, receiveBuffer / 2);
    const room = Math.max(0, Math.min(own, this.#memory.free, 65535 << this.#scale));
    const edge = (this.#next + room) >>> 0;
    // Small advances make for small segments (RFC 9293 section 3.8.6.2.2), and an edge never moves back.
    return sequenceDifference(edge, this.#edge) >= Math.min(LINK_MSS, receiveBuffer / 2) ? edge : this.#edge;
  }

  /** Whether the guest, which can send little or nothing, should hear that it may send more. */
  windowUpdateDue(): boolean {
    const { receiveBuffer } = this.#tuning;
    const advance = sequenceDifference(this.#possibleEdge(), this.#edge);
    return this.window < receiveBuffer / 8 && advance >= receiveBuffer / 4;
  }

  /** The window field of a segment that is sent now, and acknowledges `next`. */
  advertise(): number {
    this.#acknowledged = this.#next;
    const edge = this.#possibleEdge();
    const field = sequenceDifference(edge, this.#next) >>> this.#scale;
    const advertised = (this.#next + (field << this.#scale)) >>> 0;
    if (sequenceDifference(advertised, this.#edge) > 0) this.#edge = advertised;
    return field;
  }

  /** Gives all memory back. */
  dispose(): void {
    this.#memory.release(this.held);
    this.#queue.clear();
    this.#writing = 0;
    this.#ended = true;
  }
}
