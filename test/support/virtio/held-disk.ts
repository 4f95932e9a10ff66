import { type Disk, PENDING } from '#dist/backends/disk/disk.js';
import type { IoRequest } from '#dist/backends/guest-io.js';
import type { Segments } from '#dist/virtio/segments.js';

/** An operation that a HeldDisk was asked for. */
export interface HeldOperation {
  readonly what: 'read' | 'write' | 'flush' | 'discard' | 'zero' | 'unmap';
  readonly offset: number;
  readonly length: number;
  readonly segments: Segments | undefined;
  readonly request: IoRequest;
}

/** A disk on which nothing ends before its test says so. */
export class HeldDisk implements Disk {
  readonly path = 'held.img';
  readonly size: number;
  readonly readOnly: boolean;
  readonly blockSize = 512;
  readonly physicalBlockSize = 4096;
  /** Not ended yet, the oldest first. */
  readonly operations: HeldOperation[] = [];
  canceled = 0;

  constructor(size = 1 << 20, readOnly = false) {
    this.size = size;
    this.readOnly = readOnly;
  }

  /** What is asked for and not ended. */
  get asked(): string[] {
    return this.operations.map(({ what }) => what);
  }

  /** Ends the operation at that place in the order. @param data what a read finds. */
  end(index = 0, result = 0, data?: Uint8Array): void {
    const [operation] = this.operations.splice(index, 1);
    if (!operation) throw new Error('nothing to end');
    if (data) operation.segments?.write(0, data);
    operation.request.ioDone(result);
  }

  attach(): void {}

  handOver(): void {}

  takeBack(): void {}

  read(offset: number, into: Segments, request: IoRequest): number {
    return this.#hold('read', offset, into.length, request, into);
  }

  write(offset: number, from: Segments, request: IoRequest): number {
    return this.#hold('write', offset, from.length, request, from);
  }

  flush(request: IoRequest): number {
    return this.#hold('flush', 0, 0, request);
  }

  sync(request: IoRequest): number {
    return this.flush(request);
  }

  discard(offset: number, length: number, request: IoRequest): number {
    return this.#hold('discard', offset, length, request);
  }

  zero(offset: number, length: number, unmap: boolean, request: IoRequest): number {
    return this.#hold(unmap ? 'unmap' : 'zero', offset, length, request);
  }

  cancel(): void {
    this.canceled++;
  }

  close(): void {}

  #hold(what: HeldOperation['what'], offset: number, length: number, request: IoRequest, segments?: Segments): number {
    this.operations.push({ what, offset, length, segments, request });
    return PENDING;
  }
}
