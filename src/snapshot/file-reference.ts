import { createHash } from 'node:crypto';
import { closeSync, constants, openSync, readSync, statSync } from 'node:fs';
import { resolve } from 'node:path';
import type { FileReference } from './format.js';

/** Contents are sampled by so many pieces of so many bytes, spread over the file; a small file is taken whole. */
const PIECES = 32;
const PIECE = 4096;

/** How a file of the host can be known again, exactly as it is. @throws the error of stat(2) or read(2). */
export function referenceTo(path: string): FileReference {
  const absolute = resolve(path);
  const identity = identityOf(absolute);
  return { path: absolute, ...identity, contents: sample(absolute, Number(identity.size)) };
}

/**
 * Whether a file still is what was referred to. A snapshot may be anybody's, and so may the paths in it: who has never
 * read the file cannot tell what is in it. That its time and size are compared first keeps other files from being opened.
 */
export function isUnchanged(reference: FileReference): boolean {
  const { path, contents } = reference;
  try {
    const identity = identityOf(path);
    for (const name of ['device', 'inode', 'size', 'modifiedNs', 'changedNs'] as const) {
      if (identity[name] !== reference[name]) return false;
    }
    return sample(path, Number(identity.size)) === contents;
  } catch {
    return false;
  }
}

function identityOf(path: string): Omit<FileReference, 'path' | 'contents'> {
  const stat = statSync(path, { bigint: true });
  // To open anything else may do something, or wait.
  if (!stat.isFile() && !stat.isBlockDevice()) throw new Error('neither a file nor a block device');
  return {
    device: stat.dev.toString(),
    inode: stat.ino.toString(),
    size: stat.size.toString(),
    modifiedNs: stat.mtimeNs.toString(),
    changedNs: stat.ctimeNs.toString(),
  };
}

/** @param size of a file; 0 of a block device, of which the beginning is taken. */
function sample(path: string, size: number): string {
  const hash = createHash('sha256');
  const buffer = Buffer.alloc(PIECE);
  const step = Math.max(PIECE, (size - PIECE) / (PIECES - 1));
  const fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOCTTY);
  try {
    for (let i = 0; i < PIECES; i++) {
      const length = readSync(fd, buffer, 0, PIECE, Math.round(i * step));
      if (length === 0) break;
      hash.update(buffer.subarray(0, length));
    }
  } finally {
    closeSync(fd);
  }
  return hash.digest('hex');
}
