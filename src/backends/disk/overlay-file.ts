import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  linkSync,
  openSync,
  readSync,
  realpathSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { dirname } from 'node:path';
import { DriveError } from '../../errors.js';
import { AllocationBitmap, CLUSTER } from './allocation-bitmap.js';
import { closeImage, driveError, type ImageFile, openLocked } from './image-file.js';

/*
 * An overlay file, all integers little-endian:
 *
 *   0     header, one cluster:
 *           0  8 bytes  magic "tsvisor\n"
 *           8  u32      version, 1
 *          12  u32      cluster size, 4096
 *          16  u64      size of the base in bytes
 *          24  u64      time of the base's last change, ns since 1970; 0 for a block device, which has none
 *          32  u32      length of the base's path
 *          36           path of the base when the overlay was made, UTF-8: for messages only
 *        4064  32 bytes SHA-256 of the 4064 bytes before
 *   4096  bitmap: a bit for each cluster of the base, set when the cluster is here; filled up to a whole cluster
 *   then  the clusters, each at its place: a sparse file, as long as header, bitmap and base together
 *
 * A bit is written only when the cluster's data is durable, so that after a crash a cluster is either the base's or whole.
 */
const MAGIC = Buffer.from('tsvisor\n', 'latin1');
const VERSION = 1;
const HEADER = CLUSTER;
const PATH = 36;
const CHECKSUM = HEADER - 32;
/** Its bitmap takes 256 MiB. */
const MAX_BASE = 8 * 2 ** 40;

const ZEROES = new Uint8Array(2 ** 20);

export interface OverlayFile {
  readonly fd: number;
  /** The same file with O_DIRECT; -1 unless asked for. */
  readonly directFd: number;
  readonly bitmap: AllocationBitmap;
  /** Where the bitmap and the first cluster are in the file, in bytes. */
  readonly bitmapOffset: number;
  readonly dataOffset: number;
}

/** Opens and locks an overlay, which may be anybody's file. @throws DriveError that names it. */
export function openOverlay(path: string, base: ImageFile, basePath: string, direct: boolean): OverlayFile {
  const { fd, directFd } = openLocked(path, { writable: true, direct });
  try {
    const stat = fstatSync(fd);
    if (!stat.isFile()) throw new DriveError(`${path}: an overlay must be a regular file`);
    checkHeader(path, readAt(fd, 0, HEADER), base, basePath);
    const { clusters, dataOffset } = layoutOf(base.size);
    const expected = dataOffset + base.size;
    if (stat.size !== expected) {
      throw damaged(path, `it has ${stat.size} bytes instead of ${expected}`);
    }
    const bitmap = new AllocationBitmap(readAt(fd, HEADER, dataOffset - HEADER), clusters);
    if (bitmap.overflows) throw damaged(path, 'its bitmap goes beyond the base');
    return { fd, directFd, bitmap, bitmapOffset: HEADER, dataOffset };
  } catch (error) {
    closeImage({ fd, directFd });
    throw error instanceof DriveError ? error : driveError(path, error);
  }
}

function layoutOf(size: number): { clusters: number; dataOffset: number } {
  const clusters = Math.ceil(size / CLUSTER);
  return { clusters, dataOffset: HEADER + Math.ceil(clusters / 8 / CLUSTER) * CLUSTER };
}

/** Makes an overlay: complete under its name, or not at all. @throws DriveError */
export function createOverlay(path: string, base: ImageFile, basePath: string): void {
  if (base.size > MAX_BASE)
    throw new DriveError(`${basePath}: larger than the 8 TiB that an overlay can have below it`);
  const temporary = `${path}.${process.pid}.new`;
  try {
    rmSync(temporary, { force: true });
    const fd = openSync(temporary, constants.O_RDWR | constants.O_CREAT | constants.O_EXCL, 0o644);
    try {
      const { dataOffset } = layoutOf(base.size);
      ftruncateSync(fd, dataOffset + base.size);
      writeAll(fd, encodeHeader(base, basePath), 0);
      // With its blocks the bitmap can be written when the host has no space left for data.
      for (let at = HEADER; at < dataOffset; at += ZEROES.length) {
        writeAll(fd, ZEROES.subarray(0, dataOffset - at), at);
      }
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    linkSync(temporary, path);
    rmSync(temporary);
    const folder = openSync(dirname(path), constants.O_RDONLY);
    fsyncSync(folder);
    closeSync(folder);
  } catch (error) {
    rmSync(temporary, { force: true });
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === 'EEXIST') return; // another machine has made it meanwhile: the lock decides
    const remedy = code === 'ENOENT' ? '; make its folder first' : '';
    throw new DriveError(`${path}: the overlay cannot be made: ${code ?? message}${remedy}`, { cause: error });
  }
}

function encodeHeader(base: ImageFile, basePath: string): Buffer {
  const header = Buffer.alloc(HEADER);
  MAGIC.copy(header);
  header.writeUInt32LE(VERSION, 8);
  header.writeUInt32LE(CLUSTER, 12);
  header.writeBigUInt64LE(BigInt(base.size), 16);
  header.writeBigUInt64LE(changeTime(base), 24);
  const length = header.write(realpathSync(basePath), PATH, CHECKSUM - PATH, 'utf8');
  header.writeUInt32LE(length, 32);
  checksum(header).copy(header, CHECKSUM);
  return header;
}

function checkHeader(path: string, header: Buffer, base: ImageFile, basePath: string): void {
  if (header.length < HEADER || !header.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw new DriveError(`${path}: not an overlay of tsvisor; name another file, which is made when it is missing`);
  }
  if (!header.subarray(CHECKSUM).equals(checksum(header))) throw damaged(path, 'the checksum of its header is wrong');
  const version = header.readUInt32LE(8);
  if (version !== VERSION || header.readUInt32LE(12) !== CLUSTER) {
    throw new DriveError(`${path}: an overlay of version ${version}; this tsvisor knows version ${VERSION}`);
  }
  const remedy = 'give it the base that it was made for, or remove it and with it the guest’s writes';
  const size = header.readBigUInt64LE(16);
  if (size !== BigInt(base.size)) {
    const made = header
      .toString('utf8', PATH, Math.min(PATH + header.readUInt32LE(32), CHECKSUM))
      .replace(/\p{C}/gu, '?');
    throw new DriveError(`${path}: an overlay for ${made} of ${size} bytes; ${basePath} has ${base.size}; ${remedy}`);
  }
  if (header.readBigUInt64LE(24) !== changeTime(base)) {
    throw new DriveError(`${path}: ${basePath} is not, or is no longer, what this overlay was made for; ${remedy}`);
  }
}

function checksum(header: Buffer): Buffer {
  const { createHash } = process.getBuiltinModule('node:crypto'); // for those who have an overlay
  return createHash('sha256').update(header.subarray(0, CHECKSUM)).digest();
}

function changeTime({ fd, stat }: ImageFile): bigint {
  return stat.isFile() ? BigInt.asUintN(64, fstatSync(fd, { bigint: true }).mtimeNs) : 0n;
}

function damaged(path: string, what: string): DriveError {
  return new DriveError(`${path}: a damaged overlay: ${what}; remove it, and with it the guest’s writes`);
}

/** Writes every byte. */
export function writeAll(fd: number, bytes: Uint8Array, offset: number): void {
  for (let done = 0; done < bytes.length; ) {
    done += writeSync(fd, bytes, done, bytes.length - done, offset + done);
  }
}

/** As many bytes as the file has there. */
function readAt(fd: number, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  let done = 0;
  while (done < length) {
    const n = readSync(fd, bytes, done, length - done, offset + done);
    if (n === 0) break;
    done += n;
  }
  return bytes.subarray(0, done);
}
