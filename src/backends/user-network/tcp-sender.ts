import { ByteQueue } from '../byte-queue.js';
import type { TcpMemory } from './tcp-memory.js';
import { type Segment, sequenceDifference } from './tcp-segments.js';
import type { Tuning } from './tuning.js';

/** Duplicate acknowledgements that mean a loss (RFC 5681); fewer when fewer segments are under way (RFC 5827). */
const DUPLICATES = 3;

/** How a segment leaves: `length` bytes of the queue from `offset` on, and perhaps the FIN after them. */
export type Emit = (sequence: number, queue: ByteQueue, offset: number, length: number, fin: boolean) => void;

export const Acked = { OLD: 0, INVALID: 1, NEW: 2, RETRANSMIT: 3 } as const;
export type Acked = (typeof Acked)[keyof typeof Acked];

/**
 * The host's data on its way to the guest: what is unacknowledged, the guest's window, and the retransmission timeout. The
 * link loses nothing and tells when it is full, so there is no congestion window but after a timeout, when the guest may
 * have dropped frames because it was overrun.
 */
export class TcpSender {
  readonly #tuning: Tuning;
  readonly #memory: TcpMemory;
  readonly #queue = new ByteQueue();
  /** The oldest unacknowledged sequence number, the next to send, and the highest ever sent plus one. */
  #una: number;
  #next: number;
  #max: number;
  #window = 0;
  #largestWindow = 0;
  #scale = 0;
  /** The segment that the window comes from (RFC 9293: WL1 and WL2). */
  #windowSequence = 0;
  #windowAcknowledgement = 0;
  #congestion = Number.POSITIVE_INFINITY;
  /** The SYN and FIN count as one byte each. */
  #synAcked = false;
  #finQueued = false;
  #finAcked = false;
  #duplicates = 0;
  #recovering = false;
  #recover = 0;
  /** The round-trip time of one segment at a time is taken (RFC 6298). */
  #timing = false;
  #timedSequence = 0;
  #timedAt = 0;
  #smoothed = 0;
  #variance = 0;
  #timeout: number;
  /** Timeouts or probes since the guest last acknowledged something. */
  #silence = 0;
  /** Probes of a closed window in a row. */
  #probes = 0;
  mss = 536;

  constructor(tuning: Tuning, memory: TcpMemory, initialSequence: number) {
    this.#tuning = tuning;
    this.#memory = memory;
    this.#una = this.#next = this.#max = initialSequence;
    this.#timeout = tuning.firstTimeout;
  }

  get una(): number {
    return this.#una;
  }

  get next(): number {
    return this.#next;
  }

  /** Bytes for the guest that it has not acknowledged. */
  get held(): number {
    return this.#queue.length;
  }

  get finAcked(): boolean {
    return this.#finAcked;
  }

  get finSent(): boolean {
    return this.#finQueued && (this.#finAcked || this.#offset > this.#queue.length);
  }

  get inFlight(): boolean {
    return this.#next !== this.#una;
  }

  /** Whether there is something to send that only the guest's window holds back. */
  get waitsForWindow(): boolean {
    return !this.inFlight && (this.#queue.length > 0 || (this.#finQueued && !this.#finAcked));
  }

  /** The timeout of now, in milliseconds, with its backoff. */
  get timeout(): number {
    return Math.min(this.#timeout * 2 ** Math.max(this.#silence, this.#probes), this.#tuning.maximumTimeout);
  }

  get silence(): number {
    return this.#silence;
  }

  /** How far the next byte is from the oldest unacknowledged one. */
  get #offset(): number {
    return sequenceDifference(this.#next, this.#una);
  }

  /** A SYN is on its way: the first time, or again. */
  synSent(): void {
    if (this.#next === this.#una) {
      this.#time();
      this.#next = this.#max = (this.#una + 1) >>> 0;
    } else {
      this.#timing = false;
    }
  }

  /** The guest's SYN or SYN-ACK. */
  peer(segment: Segment, scaled: boolean): void {
    this.mss = segment.mss;
    this.#scale = scaled ? segment.windowScale : 0;
    this.#setWindow(segment, segment.window);
  }

  #setWindow(segment: Segment, window: number): void {
    this.#window = window;
    this.#largestWindow = Math.max(this.#largestWindow, window);
    this.#windowSequence = segment.sequence;
    this.#windowAcknowledgement = segment.acknowledgement;
  }

  push(bytes: Uint8Array): void {
    this.#queue.push(bytes);
    this.#memory.take(bytes.length);
  }

  /** After all data comes a FIN. */
  finish(): void {
    this.#finQueued = true;
  }

  /** Takes the acknowledgement and the window of an acceptable segment. @param largest that we send, in bytes. */
  acknowledge(segment: Segment, largest: number): Acked {
    const ack = segment.acknowledgement;
    const count = sequenceDifference(ack, this.#una);
    if (count < 0) return Acked.OLD;
    if (sequenceDifference(ack, this.#max) > 0) return Acked.INVALID;
    const before = this.#window;
    const newer = sequenceDifference(segment.sequence, this.#windowSequence);
    if (newer > 0 || (newer === 0 && sequenceDifference(ack, this.#windowAcknowledgement) >= 0)) {
      this.#setWindow(segment, segment.window << this.#scale);
    }
    if (!this.inFlight) this.#silence = 0; // it only had to show that it is there
    if (count > 0) return this.#advance(ack, count);
    const repeats = segment.end === segment.start && this.#window === before && !segment.has(3 /* FIN, SYN */);
    return repeats && this.inFlight ? this.#duplicate(largest) : Acked.OLD;
  }

  #advance(ack: number, count: number): Acked {
    let data = count;
    if (!this.#synAcked) {
      this.#synAcked = true;
      data--;
    }
    if (data > this.#queue.length) {
      this.#finAcked = true;
      data = this.#queue.length;
    }
    if (data > 0) {
      this.#queue.consume(data);
      this.#memory.release(data);
    }
    this.#una = ack;
    if (sequenceDifference(ack, this.#next) > 0) this.#next = ack;
    this.#silence = 0;
    this.#duplicates = 0;
    if (this.#congestion < this.#window) this.#congestion += count;
    else this.#congestion = Number.POSITIVE_INFINITY;
    if (this.#timing && sequenceDifference(ack, this.#timedSequence) >= 0) this.#sample();
    if (!this.#recovering) return Acked.NEW;
    // A partial acknowledgement: the segment after it is lost too (RFC 6582).
    this.#recovering = sequenceDifference(ack, this.#recover) < 0;
    return this.#recovering && this.inFlight ? Acked.RETRANSMIT : Acked.NEW;
  }

  #duplicate(largest: number): Acked {
    const segments = Math.ceil(this.#offset / largest);
    if (this.#recovering || segments < 2 || ++this.#duplicates < Math.min(DUPLICATES, segments - 1)) return Acked.OLD;
    this.#recovering = true;
    this.#recover = this.#next;
    return Acked.RETRANSMIT;
  }

  #time(): void {
    this.#timing = true;
    this.#timedAt = performance.now();
    this.#timedSequence = (this.#next + 1) >>> 0;
  }

  /** RFC 6298 section 2. */
  #sample(): void {
    this.#timing = false;
    const time = performance.now() - this.#timedAt;
    if (this.#smoothed === 0) {
      this.#smoothed = time;
      this.#variance = time / 2;
    } else {
      this.#variance = 0.75 * this.#variance + 0.25 * Math.abs(this.#smoothed - time);
      this.#smoothed = 0.875 * this.#smoothed + 0.125 * time;
    }
    this.#timeout = Math.max(this.#tuning.minimumTimeout, this.#smoothed + 4 * this.#variance);
  }

  /** Sends what the window allows, in segments of up to `largest` bytes, while `ready()`. */
  transmit(largest: number, ready: () => boolean, emit: Emit): void {
    for (;;) {
      const offset = this.#offset;
      const unsent = this.#queue.length - offset;
      if (unsent < 0) return; // the FIN is sent
      const usable = Math.min(this.#window, this.#congestion) - offset;
      if (usable <= 0 || (unsent === 0 && (!this.#finQueued || this.#finAcked))) return;
      const length = Math.min(unsent, usable, largest);
      // Small segments because of a small window wait for the next acknowledgement (RFC 9293 section 3.8.6.2.1).
      if (length < Math.min(unsent, largest) && offset > 0 && length < this.#largestWindow / 2) return;
      if (!ready()) return;
      const fin = this.#finQueued && length === unsent && usable > length;
      if (unsent === 0 && !fin) return;
      if (!this.#timing && this.#next === this.#max) this.#time();
      this.#probes = 0;
      emit(this.#next, this.#queue, offset, length, fin);
      this.#next = (this.#next + length + (fin ? 1 : 0)) >>> 0;
      if (sequenceDifference(this.#next, this.#max) > 0) this.#max = this.#next;
      if (fin) return;
    }
  }

  /** Sends the oldest unacknowledged segment again. */
  retransmit(largest: number, emit: Emit): void {
    this.#timing = false;
    const sent = Math.min(this.#offset, this.#queue.length);
    const length = Math.min(sent, largest);
    const fin = this.#finQueued && length === this.#queue.length && this.#offset > length;
    if (length > 0 || fin) emit(this.#una, this.#queue, 0, length, fin);
  }

  /** The timer fired: everything unacknowledged is sent again, slowly at first. @returns false to give up. */
  expired(largest: number, retries: number): boolean {
    this.#timing = false;
    if (++this.#silence > retries) return false;
    if (this.#synAcked) {
      this.#next = this.#una;
      this.#congestion = largest;
    }
    this.#recovering = false;
    this.#duplicates = 0;
    return true;
  }

  /** A probe of a closed window, or of an idle guest, is sent. @returns false to give up. */
  probed(retries: number): boolean {
    this.#probes++;
    return ++this.#silence <= retries;
  }

  /** Gives all memory back. */
  dispose(): void {
    this.#memory.release(this.#queue.length);
    this.#queue.clear();
  }
}
