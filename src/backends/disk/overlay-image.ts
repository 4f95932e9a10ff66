import { fdatasyncSync } from 'node:fs';
import { constants } from 'node:os';
import { DriveError, errnoName } from '../../errors.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { Segments } from '../../virtio/segments.js';
import type { GuestIo, IoRequest } from '../guest-io.js';
import { type AllocationBitmap, CLUSTER } from './allocation-bitmap.js';
import type { Disk } from './disk.js';
import { HostFile } from './host-file.js';
import { type ImageFile, lockImage, unlockImage } from './image-file.js';
import { type OverlayFile, writeAll } from './overlay-file.js';
import { OverlayOperation, type OverlayWork } from './overlay-operation.js';
import { OverlaySync } from './overlay-sync.js';

const { ECANCELED } = constants.errno;

/**
 * A disk that starts as its base, which is only read; what the guest writes goes to the overlay's file, cluster by
 * cluster. A cluster that is written in part is completed from the base first.
 */
export class OverlayImage implements Disk {
  readonly path: string;
  readonly size: number;
  readonly readOnly = false;
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  readonly bitmap: AllocationBitmap;
  readonly base: HostFile;
  readonly file: HostFile;
  readonly dataOffset: number;
  /** Counts cancel()s: an operation of before goes no further. */
  era = 0;
  readonly #sync: OverlaySync;
  readonly #bitmapOffset: number;
  readonly #unsafe: boolean;
  #memory: GuestMemory | undefined;
  #free: OverlayOperation[] = [];
  /** Operations that allocate clusters, each for itself. */
  #allocating: OverlayOperation[] = [];
  /** Those that want clusters which one of the former has. */
  #waiting: OverlayOperation[] = [];

  /** Owns both files. */
  constructor(path: string, base: ImageFile, overlay: OverlayFile, unsafe: boolean) {
    this.path = path;
    this.size = base.size;
    this.blockSize = base.blockSize;
    this.physicalBlockSize = Math.max(base.physicalBlockSize, CLUSTER);
    this.base = new HostFile(base.fd, base.directFd);
    this.file = new HostFile(overlay.fd, overlay.directFd);
    this.bitmap = overlay.bitmap;
    this.dataOffset = overlay.dataOffset;
    this.#sync = new OverlaySync(this.file, overlay);
    this.#bitmapOffset = overlay.bitmapOffset;
    this.#unsafe = unsafe;
  }

  attach(io: GuestIo, memory: GuestMemory): void {
    this.base.attach(io, memory);
    this.file.attach(io, memory);
    this.#memory = memory;
    this.#sync.abandon();
    this.#free = [];
    this.#allocating = [];
    this.#waiting = [];
  }

  read(offset: number, into: Segments, request: IoRequest): number {
    const first = Math.floor(offset / CLUSTER);
    const end = Math.ceil((offset + into.length) / CLUSTER);
    if (this.bitmap.find(false, first, end) === end) return this.file.read(this.dataOffset + offset, into, request);
    if (this.bitmap.find(true, first, end) === end) return this.base.read(offset, into, request);
    return this.#start('read', offset, into.length, into, request);
  }

  write(offset: number, from: Segments, request: IoRequest): number {
    const first = Math.floor(offset / CLUSTER);
    const end = Math.ceil((offset + from.length) / CLUSTER);
    // No operation that allocates clusters touches those that are here but with data of its own.
    if (this.bitmap.find(false, first, end) === end) return this.file.write(this.dataOffset + offset, from, request);
    return this.#start('write', offset, from.length, from, request);
  }

  flush(request: IoRequest): number {
    return this.#unsafe ? 0 : this.#sync.flush(request);
  }

  sync(request: IoRequest): number {
    return this.#sync.flush(request);
  }

  /** Clusters of the base stay as they are: there is nothing to give back. */
  discard(offset: number, length: number, request: IoRequest): number {
    return this.#start('discard', offset, length, undefined, request);
  }

  zero(offset: number, length: number, unmap: boolean, request: IoRequest): number {
    return this.#start(unmap ? 'unmap' : 'zero', offset, length, undefined, request);
  }

  cancel(): void {
    this.era++;
    this.base.cancel();
    this.file.cancel();
    for (const operation of this.#waiting.splice(0)) operation.finish(-ECANCELED);
  }

  handOver(): void {
    this.#settle();
    unlockImage(this.file.fd);
  }

  takeBack(): void {
    lockImage(this.file.fd, this.path, true);
  }

  close(): void {
    try {
      this.#settle();
    } finally {
      this.base.close();
      this.file.close();
    }
  }

  /** @throws DriveError */
  #settle(): void {
    this.#sync.abandon();
    try {
      this.#writeBitmap();
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      throw new DriveError(`${this.path}: the guest’s last writes are lost: ${code ?? message}`, { cause: error });
    }
  }

  /** Lets an operation allocate its clusters; one that cannot yet is told by retry(). */
  claim(operation: OverlayOperation): boolean {
    const { firstCluster, endCluster } = operation;
    const taken = this.#allocating.some((one) => one.firstCluster < endCluster && firstCluster < one.endCluster);
    (taken ? this.#waiting : this.#allocating).push(operation);
    return !taken;
  }

  /** An operation is over. */
  release(operation: OverlayOperation): void {
    const at = this.#allocating.indexOf(operation);
    if (at >= 0) this.#allocating.splice(at, 1);
    this.#free.push(operation);
  }

  /** Clusters are free that some may wait for. */
  retryWaiting(): void {
    if (this.#waiting.length === 0) return;
    for (const operation of this.#waiting.splice(0)) operation.retry();
  }

  #start(
    work: OverlayWork,
    offset: number,
    length: number,
    segments: Segments | undefined,
    request: IoRequest,
  ): number {
    if (length === 0) return 0;
    const operation = this.#free.pop() ?? new OverlayOperation(this, this.#memory as GuestMemory);
    return operation.start(work, offset, length, segments, request);
  }

  /** As OverlaySync does, but now. */
  #writeBitmap(): void {
    const { fd } = this.file;
    const error = this.file.flushError;
    if (error) throw new Error(errnoName(-error));
    const pieces = this.bitmap.takeDirty();
    if (!this.#unsafe) fdatasyncSync(fd);
    for (const { offset, bytes } of pieces) writeAll(fd, bytes, this.#bitmapOffset + offset);
    if (pieces.length > 0 && !this.#unsafe) fdatasyncSync(fd);
  }
}
