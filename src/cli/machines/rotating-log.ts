import { closeSync, existsSync, openSync, renameSync, rmSync, writeSync } from 'node:fs';

/** Bytes of a log file; the one before it is kept as well, so that this much is always there once it was written. */
const MAX_BYTES = 2 ** 20;

/** Where the part of a log is that came before the file itself. */
export const olderPart = (path: string): string => `${path}.1`;

/** A log of the last megabyte or two. What cannot be written (a full disk) is left out: nobody waits for a log. */
export class RotatingLog implements Disposable {
  readonly #path: string;
  readonly #limit: number;
  #fd: number;
  #size = 0;

  constructor(path: string, limit = MAX_BYTES) {
    this.#path = path;
    this.#limit = limit;
    this.#fd = openSync(path, 'wx', 0o600);
  }

  write(chunk: Uint8Array): void {
    try {
      if (this.#size > 0 && this.#size + chunk.length > this.#limit) this.#rotate();
      if (this.#fd >= 0) this.#size += writeSync(this.#fd, chunk);
    } catch {
      // As said above. A file that is full or gone may be written again when it is next rotated.
      this.#size += chunk.length;
    }
  }

  /** The path is another file then, or none: whoever removed the folder does not get it back. */
  #rotate(): void {
    this[Symbol.dispose]();
    this.#size = 0;
    if (!existsSync(this.#path)) return;
    rmSync(olderPart(this.#path), { force: true });
    renameSync(this.#path, olderPart(this.#path));
    this.#fd = openSync(this.#path, 'wx', 0o600);
  }

  [Symbol.dispose](): void {
    if (this.#fd >= 0) closeSync(this.#fd);
    this.#fd = -1;
  }
}
