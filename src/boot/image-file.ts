import { closeSync, constants, fstatSync, openSync, readSync, type Stats } from 'node:fs';
import { ImageError } from '../errors.js';
import type { GuestMemory } from '../memory/guest-memory.js';

/** Bytes that an image is read from: a file, or an unpacked payload in host memory. */
export interface ImageBytes {
  /** How errors name it, e.g. `kernel ./vmlinux`. */
  readonly name: string;
  readonly size: number;
  /** Fills `target` from `offset`; throws ImageError if the bytes are not there. */
  read(offset: number, target: Uint8Array): void;
}

/** Bytes. */
const HEAD = 8192;

// One read(2) moves at most 2^31 - 4096 bytes, and Node takes the length as an int32.
const MAX_READ = 1 << 30;

/** An open kernel or initrd. Its owner closes it. */
export class ImageFile implements ImageBytes {
  readonly name: string;
  readonly size: number;
  readonly #fd: number;
  /** Its beginning, where headers are: read once. */
  #head: Uint8Array | undefined;

  /** Opens a regular, non-empty file; anything else is an ImageError that says what it is. */
  constructor(what: 'kernel' | 'initrd', path: string) {
    this.name = `${what} ${path}`;
    this.#fd = this.#open(path);
    try {
      const stat = fstatSync(this.#fd);
      if (!stat.isFile()) throw new ImageError(`${this.name}: is ${kindOf(stat)}; name a regular file`);
      if (stat.size === 0) throw new ImageError(`${this.name}: is empty; build or copy it again`);
      this.size = stat.size;
    } catch (error) {
      this.close();
      throw error;
    }
  }

  read(offset: number, target: Uint8Array): void {
    const end = offset + target.length;
    if (end > Math.min(this.size, HEAD)) {
      this.#read(offset, target);
      return;
    }
    if (!this.#head) {
      this.#head = new Uint8Array(Math.min(this.size, HEAD));
      this.#read(0, this.#head);
    }
    target.set(this.#head.subarray(offset, end));
  }

  #read(offset: number, target: Uint8Array): void {
    for (let done = 0; done < target.length; ) {
      let count: number;
      try {
        count = readSync(this.#fd, target, done, Math.min(target.length - done, MAX_READ), offset + done);
      } catch (error) {
        throw new ImageError(`${this.name}: cannot be read (${errorCode(error)}); check the disk`, { cause: error });
      }
      if (count === 0) {
        throw new ImageError(`${this.name}: ends at byte ${offset + done} while being read; let no one change it`);
      }
      done += count;
    }
  }

  close(): void {
    closeSync(this.#fd);
  }

  #open(path: string): number {
    try {
      // O_NONBLOCK: opening a FIFO must not wait for a writer. It changes nothing for regular files.
      return openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    } catch (error) {
      const code = errorCode(error);
      throw new ImageError(`${this.name}: ${openProblems[code] ?? `cannot be opened (${code})`}`, { cause: error });
    }
  }
}

/** Bytes in host memory. */
export class ImageBuffer implements ImageBytes {
  readonly name: string;
  readonly #bytes: Uint8Array;

  constructor(name: string, bytes: Uint8Array) {
    this.name = name;
    this.#bytes = bytes;
  }

  get size(): number {
    return this.#bytes.length;
  }

  read(offset: number, target: Uint8Array): void {
    const end = offset + target.length;
    if (!(offset >= 0 && end <= this.#bytes.length)) throw new ImageError(`${this.name}: ends before byte ${end}`);
    target.set(this.#bytes.subarray(offset, end));
  }
}

/** Reads `length` bytes at `offset`, or what there is of them, into host memory. */
export function readUpTo(image: ImageBytes, offset: number, length: number): Uint8Array {
  const bytes = new Uint8Array(Math.max(0, Math.min(length, image.size - offset)));
  image.read(offset, bytes);
  return bytes;
}

/** Reads straight into guest RAM, with no copy between; the range may cross regions, and must be RAM. */
export function readIntoGuest(image: ImageBytes, offset: number, memory: GuestMemory, gpa: number, length: number) {
  for (const range of memory.ranges) {
    const start = Math.max(gpa, range.gpa);
    const end = Math.min(gpa + length, range.gpa + range.size);
    if (start < end) image.read(offset + start - gpa, memory.slice(start, end - start));
  }
}

const openProblems: Record<string, string> = {
  ENOENT: 'no such file; check the path',
  ENOTDIR: 'a part of the path is not a directory; check the path',
  EACCES: 'permission denied; make it readable for this user',
  EPERM: 'permission denied; make it readable for this user',
  ELOOP: 'too many symbolic links; check the path',
  ENAMETOOLONG: 'the path is too long; check the path',
  ENXIO: 'is a socket or a device with no driver; name a regular file',
  ERR_INVALID_ARG_VALUE: 'the path contains a NUL byte; check the path',
  ERR_INVALID_ARG_TYPE: 'the path is not a string; check the path',
};

function errorCode(error: unknown): string {
  return error instanceof Error && 'code' in error ? String(error.code) : String(error);
}

function kindOf(stat: Stats): string {
  if (stat.isDirectory()) return 'a directory';
  if (stat.isFIFO()) return 'a FIFO';
  if (stat.isCharacterDevice() || stat.isBlockDevice()) return 'a device';
  return 'not a file';
}
