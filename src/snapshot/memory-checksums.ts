import type { FileHandle } from 'node:fs/promises';
import { crc32 } from 'node:zlib';
import { SnapshotError } from '../errors.js';
import { addon } from '../kvm/addon.js';

/** Bytes of a memory file that one checksum is of; the last may be of fewer. */
const CHUNK = 2 ** 20;
const CHECKSUM_BYTES = 4;

/** Bytes of the checksums of a memory file: the CRC-32 of zlib of each chunk, in order, little-endian. */
export function checksumsLength(size: number): number {
  return Math.ceil(size / CHUNK) * CHECKSUM_BYTES;
}

/** The checksums of a memory file, by its contents: a hole counts as the zeros that it reads as, and is not read. */
export async function memoryChecksumsOf(file: FileHandle, size: number): Promise<Uint8Array> {
  const checksums = new Uint8Array(checksumsLength(size));
  const view = new DataView(checksums.buffer);
  const hole = crc32(new Uint8Array(CHUNK));
  for (let at = 0; at < size; at += CHUNK) {
    const length = Math.min(CHUNK, size - at);
    const checksum = length === CHUNK ? hole : crc32(new Uint8Array(length));
    view.setUint32((at / CHUNK) * CHECKSUM_BYTES, checksum, true);
  }
  for await (const { at, bytes } of dataChunks(file, size)) {
    view.setUint32((at / CHUNK) * CHECKSUM_BYTES, crc32(bytes), true);
  }
  return checksums;
}

/** @param path for messages. @throws SnapshotError unless a memory file has the contents that the checksums are of. */
export async function verifyMemory(file: FileHandle, checksums: Uint8Array, size: number, path: string): Promise<void> {
  const now = await memoryChecksumsOf(file, size).catch((cause: NodeJS.ErrnoException) => {
    throw new SnapshotError(`${path}: it cannot be read: ${cause.code ?? cause.message}`, { cause });
  });
  const differs = now.findIndex((byte, index) => byte !== checksums[index]);
  if (differs < 0) return;
  const at = Math.floor(differs / CHECKSUM_BYTES) * CHUNK;
  const range = `bytes ${at} to ${Math.min(at + CHUNK, size) - 1}`;
  throw new SnapshotError(`${path}: damaged: the checksum of ${range} is wrong; take the snapshot again`);
}

/**
 * The chunks of a memory file that are not holes, one after the other in the same buffer. They are read, and left in the
 * host's page cache, by a thread of Node's pool.
 */
export async function* dataChunks(file: FileHandle, size: number): AsyncGenerator<{ at: number; bytes: Uint8Array }> {
  const buffer = new Uint8Array(Math.min(CHUNK, size));
  for (let at = 0; at < size; at += CHUNK) {
    const data = addon.seekData(file.fd, at);
    if (data === -ENXIO) return;
    if (data > 0) at = Math.floor(data / CHUNK) * CHUNK; // any other error: a file system that knows no holes
    const bytes = buffer.subarray(0, Math.min(CHUNK, size - at));
    for (let done = 0; done < bytes.length; ) {
      const { bytesRead } = await file.read(bytes, done, bytes.length - done, at + done);
      if (bytesRead === 0) throw new SnapshotError('snapshot: the memory file became shorter');
      done += bytesRead;
    }
    yield { at, bytes };
  }
}

/** lseek(2): there is no data after that offset. */
const ENXIO = 6;
