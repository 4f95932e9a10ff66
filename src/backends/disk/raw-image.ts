import { DriveError, errnoName } from '../../errors.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { Segments } from '../../virtio/segments.js';
import type { GuestIo, IoRequest } from '../guest-io.js';
import type { Disk } from './disk.js';
import { HostFile } from './host-file.js';
import { type ImageFile, lockImage, unlockImage } from './image-file.js';

export interface RawImageOptions {
  readonly readOnly: boolean;
  /** Flushes do nothing. */
  readonly unsafe: boolean;
}

/** A disk whose contents are a file's or a block device's, byte for byte. */
export class RawImage implements Disk {
  readonly path: string;
  readonly size: number;
  readonly readOnly: boolean;
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  readonly #file: HostFile;
  readonly #unsafe: boolean;

  /** Owns the image. */
  constructor(path: string, image: ImageFile, { readOnly, unsafe }: RawImageOptions) {
    this.path = path;
    this.size = image.size;
    this.readOnly = readOnly;
    this.blockSize = image.blockSize;
    this.physicalBlockSize = image.physicalBlockSize;
    this.#file = new HostFile(image.fd, image.directFd);
    this.#unsafe = unsafe;
  }

  attach(io: GuestIo, memory: GuestMemory): void {
    this.#file.attach(io, memory);
  }

  read(offset: number, into: Segments, request: IoRequest): number {
    return this.#file.read(offset, into, request);
  }

  write(offset: number, from: Segments, request: IoRequest): number {
    return this.#file.write(offset, from, request);
  }

  flush(request: IoRequest): number {
    return this.#unsafe || this.readOnly ? 0 : this.#file.flush(request);
  }

  sync(request: IoRequest): number {
    return this.readOnly ? 0 : this.#file.flush(request);
  }

  discard(offset: number, length: number, request: IoRequest): number {
    return this.#file.discard(offset, length, request);
  }

  zero(offset: number, length: number, unmap: boolean, request: IoRequest): number {
    return this.#file.zero(offset, length, unmap, request);
  }

  cancel(): void {
    this.#file.cancel();
  }

  handOver(): void {
    if (this.readOnly) return;
    const error = this.#file.flushError;
    if (error) throw new DriveError(`${this.path}: the guest’s last writes are lost: ${errnoName(-error)}`);
    unlockImage(this.#file.fd);
  }

  takeBack(): void {
    if (!this.readOnly) lockImage(this.#file.fd, this.path, true);
  }

  close(): void {
    this.#file.close();
  }
}
