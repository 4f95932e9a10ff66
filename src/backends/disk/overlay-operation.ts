import { constants } from 'node:os';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { Segments } from '../../virtio/segments.js';
import type { IoRequest } from '../guest-io.js';
import { CLUSTER } from './allocation-bitmap.js';
import { PENDING } from './disk.js';
import { MAX_INLINE } from './host-file.js';
import type { OverlayImage } from './overlay-image.js';

const { ECANCELED, EIO } = constants.errno;

/** `unmap` is zero that may give blocks back to the host. */
export type OverlayWork = 'read' | 'write' | 'zero' | 'unmap' | 'discard';

/** What an overlay does in several steps, one after the other, each an operation of one of its files. Reused. */
export class OverlayOperation implements IoRequest {
  /** The clusters it touches: from the first, to before the end. */
  firstCluster = 0;
  endCluster = 0;
  readonly #overlay: OverlayImage;
  readonly #part: Segments;
  #work: OverlayWork = 'read';
  #segments: Segments | undefined;
  #request: IoRequest | undefined;
  #offset = 0;
  #end = 0;
  #era = 0;
  #step = 0;
  /** Where a read has come to in bytes, and a discard in clusters. */
  #at = 0;
  /** Bytes that a step of copying is to move. */
  #copying = 0;

  constructor(overlay: OverlayImage, memory: GuestMemory) {
    this.#overlay = overlay;
    this.#part = new Segments(memory);
  }

  /** @returns as an operation of Disk. */
  start(work: OverlayWork, offset: number, length: number, segments: Segments | undefined, request: IoRequest): number {
    this.#work = work;
    this.#segments = segments;
    this.#request = request;
    this.#offset = offset;
    this.#end = offset + length;
    this.firstCluster = Math.floor(offset / CLUSTER);
    this.endCluster = Math.ceil(this.#end / CLUSTER);
    this.#era = this.#overlay.era;
    this.#step = this.#copying = 0;
    this.#at = work === 'read' ? offset : Math.ceil(offset / CLUSTER);
    const outcome = this.#begin();
    if (outcome !== PENDING) this.#overlay.release(this);
    return outcome;
  }

  /** The clusters that it waited for may be free. */
  retry(): void {
    const outcome = this.#begin();
    if (outcome !== PENDING) this.finish(outcome);
  }

  ioDone(result: number): void {
    const copied = this.#copying > 0 && result >= 0;
    const outcome = this.#goOn(!copied ? result : result === this.#copying ? 0 : -EIO);
    if (outcome !== PENDING) this.finish(outcome);
  }

  finish(outcome: number): void {
    const request = this.#request as IoRequest;
    this.#overlay.release(this);
    request.ioDone(outcome);
    this.#overlay.retryWaiting();
  }

  #begin(): number {
    const allocates = this.#work !== 'read' && this.#work !== 'discard';
    if (allocates && !this.#overlay.claim(this)) return PENDING;
    return this.#goOn(0);
  }

  /** Takes steps until one has to be waited for, or all are done. */
  #goOn(result: number): number {
    let outcome = result;
    while (outcome === 0) {
      if (this.#era !== this.#overlay.era) return -ECANCELED;
      this.#copying = 0;
      if (this.#work === 'read') {
        if (this.#at === this.#end) return 0;
        outcome = this.#readRun();
      } else if (this.#work === 'discard') {
        const next = this.#discardRun();
        if (next === undefined) return 0;
        outcome = next;
      } else {
        if (this.#step === 3) {
          this.#overlay.bitmap.set(this.firstCluster, this.endCluster - 1);
          return 0;
        }
        outcome = this.#allocatingStep(this.#step++);
      }
    }
    return outcome;
  }

  /** Reads on as far as the clusters come from one file. */
  #readRun(): number {
    const { bitmap, base, file, dataOffset } = this.#overlay;
    const segments = this.#segments as Segments;
    const from = this.#at;
    const cluster = Math.floor(from / CLUSTER);
    const here = bitmap.has(cluster);
    const end = Math.min(this.#end, bitmap.find(!here, cluster, this.endCluster) * CLUSTER);
    this.#at = end;
    this.#part.cut(segments, from - this.#offset, end - from);
    const atOnce = segments.length <= MAX_INLINE;
    if (here) return file.read(dataOffset + from, this.#part, this, atOnce);
    return base.read(from, this.#part, this, atOnce);
  }

  /** Gives the next clusters back that are here and wholly in the range. @returns undefined when there are none. */
  #discardRun(): number | undefined {
    const { bitmap, file, dataOffset } = this.#overlay;
    const limit = Math.floor(this.#end / CLUSTER);
    const first = bitmap.find(true, this.#at, limit);
    if (first >= limit) return undefined;
    this.#at = bitmap.find(false, first, limit);
    return file.discard(dataOffset + first * CLUSTER, (this.#at - first) * CLUSTER, this);
  }

  /** The rest of the first cluster, the rest of the last, what was asked for; then all of them are the overlay's. */
  #allocatingStep(step: number): number {
    const { bitmap, file, dataOffset, size } = this.#overlay;
    const last = this.endCluster - 1;
    if (step === 0) return bitmap.has(this.firstCluster) ? 0 : this.#copy(this.firstCluster * CLUSTER, this.#offset);
    if (step === 1) return bitmap.has(last) ? 0 : this.#copy(this.#end, Math.min(this.endCluster * CLUSTER, size));
    const offset = dataOffset + this.#offset;
    if (this.#work === 'write') return file.write(offset, this.#segments as Segments, this);
    return file.zero(offset, this.#end - this.#offset, this.#work === 'unmap', this);
  }

  /** Copies a range, less than a cluster, from the base. */
  #copy(from: number, to: number): number {
    if (from === to) return 0;
    const { base, file, dataOffset } = this.#overlay;
    this.#copying = to - from;
    file.io.copy(this, base.fd, from, file.fd, dataOffset + from, to - from);
    return PENDING;
  }
}
