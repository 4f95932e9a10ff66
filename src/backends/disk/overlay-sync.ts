import { constants } from 'node:os';
import type { IoRequest } from '../guest-io.js';
import type { AllocationBitmap, DirtyPiece } from './allocation-bitmap.js';
import { PENDING } from './disk.js';
import type { HostFile } from './host-file.js';
import type { OverlayFile } from './overlay-file.js';

const { EIO } = constants.errno;

/**
 * Flushes of an overlay: its data, then, where clusters are new, the part of the bitmap that says so, then that. One
 * round at a time serves all who asked before it began.
 */
export class OverlaySync implements IoRequest {
  readonly #file: HostFile;
  readonly #bitmap: AllocationBitmap;
  readonly #bitmapOffset: number;
  /** What of the bitmap this round writes. */
  #pieces: DirtyPiece[] = [];
  /** What is under way: 0 the first flush, from 1 on the piece before, then the last flush. */
  #step = 0;
  /** Who waits for this round. */
  #served: IoRequest[] = [];
  /** Who waits for the next round. */
  #waiting: IoRequest[] = [];

  constructor(file: HostFile, { bitmap, bitmapOffset }: OverlayFile) {
    this.#file = file;
    this.#bitmap = bitmap;
    this.#bitmapOffset = bitmapOffset;
  }

  flush(request: IoRequest): number {
    if (this.#file.flushError) return this.#file.flushError;
    this.#waiting.push(request);
    if (this.#served.length === 0) this.#begin();
    return PENDING;
  }

  /** What was under way is no more. */
  abandon(): void {
    this.#bitmap.markDirty(this.#pieces);
    this.#pieces = [];
    this.#served = [];
    this.#waiting = [];
  }

  ioDone(result: number): void {
    const expected = this.#pieces[this.#step - 1]?.bytes.length ?? 0;
    if (result === expected) {
      this.#step++;
      this.#next();
    } else {
      this.#end(result < 0 ? result : -EIO);
    }
  }

  /** Clusters that are written from here on are of the next round. */
  #begin(): void {
    this.#served = this.#waiting;
    this.#waiting = [];
    this.#pieces = this.#bitmap.takeDirty();
    this.#step = 0;
    this.#next();
  }

  #next(): void {
    const { length } = this.#pieces;
    const piece = this.#pieces[this.#step - 1];
    if (piece) this.#file.io.writeBytes(this, this.#file.fd, this.#bitmapOffset + piece.offset, piece.bytes);
    else if (this.#step === 0 || (length > 0 && this.#step === length + 1)) this.#flushFile();
    else this.#end(0);
  }

  #flushFile(): void {
    const outcome = this.#file.flush(this);
    if (outcome !== PENDING) this.#end(outcome);
  }

  #end(result: number): void {
    if (result < 0) this.#bitmap.markDirty(this.#pieces);
    this.#pieces = [];
    const served = this.#served;
    this.#served = [];
    for (const request of served) request.ioDone(result);
    if (this.#waiting.length > 0 && this.#served.length === 0) this.#begin();
  }
}
