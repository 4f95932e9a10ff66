import { randomFillSync } from 'node:crypto';
import { closeSync, fsyncSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const BLOCK_SIZE = 4096;
const CHUNK = 1024 * 1024;
const IMAGE_SIZE = 256 * CHUNK;

/**
 * A disk image in the temporary directory: each block begins with its number, which the guest checks. It has no name any
 * more, so that nothing is left of it however this process ends.
 */
export class Image implements Disposable {
  readonly #fd: number;

  constructor() {
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-bench-'));
    this.#fd = openSync(join(folder, 'disk.raw'), 'wx+', 0o600);
    rmSync(folder, { recursive: true });
    const chunk = randomFillSync(Buffer.allocUnsafe(CHUNK));
    for (let at = 0; at < IMAGE_SIZE; at += CHUNK) {
      for (let offset = 0; offset < CHUNK; offset += BLOCK_SIZE) {
        chunk.writeBigUInt64LE(BigInt((at + offset) / BLOCK_SIZE), offset);
      }
      if (writeSync(this.#fd, chunk, 0, CHUNK, at) !== CHUNK) throw new Error(`${tmpdir()}: the disk is full`);
    }
    fsyncSync(this.#fd);
  }

  get path(): string {
    return `/proc/${process.pid}/fd/${this.#fd}`;
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd);
  }
}
