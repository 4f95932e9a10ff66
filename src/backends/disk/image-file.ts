import { closeSync, constants, fstatSync, openSync, type Stats, statSync } from 'node:fs';
import { constants as os } from 'node:os';
import { DriveError } from '../../errors.js';
import { addon } from '../../kvm/addon.js';
import { BLKGETSIZE64, BLKPBSZGET, BLKSSZGET } from '../../virtio/generated/virtio.js';

/** An image that is open, and locked for as long as it is. */
export interface ImageFile {
  readonly fd: number;
  /** The same file with O_DIRECT; -1 unless asked for. */
  readonly directFd: number;
  /** Bytes. */
  readonly size: number;
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  readonly stat: Stats;
}

const SECTOR = 512;
/** What file systems work in, nearly all of them: files are best read and written so. */
const FILE_BLOCK = 4096;

/**
 * The byte on which whoever may write an image holds a lock, and readers none: QEMU's (RAW_LOCK_PERM_BASE of its
 * file-posix.c, plus BLK_PERM_WRITE). So a QEMU that writes is noticed by readers too.
 */
const WRITER_BYTE = 101;

export interface OpenOptions {
  readonly writable: boolean;
  /** Also opens it with O_DIRECT. */
  readonly direct: boolean;
}

/**
 * Opens and locks an image, a regular file or a block device: one writer alone, or any number of readers.
 * @throws DriveError that names the file.
 */
export function openImage(path: string, options: OpenOptions): ImageFile {
  const { fd, directFd } = openLocked(path, options);
  try {
    return { fd, directFd, ...describe(fd, path) };
  } catch (error) {
    closeImage({ fd, directFd });
    throw error;
  }
}

/** As openImage(), whatever its size. */
export function openLocked(path: string, { writable, direct }: OpenOptions): { fd: number; directFd: number } {
  checkKind(path);
  const mode = writable ? constants.O_RDWR : constants.O_RDONLY;
  // Not to wait for whatever has taken the file's place meanwhile.
  const flags = mode | constants.O_NONBLOCK | constants.O_NOCTTY;
  const fd = open(path, flags, writable);
  try {
    lockImage(fd, path, writable);
    return { fd, directFd: direct ? open(path, flags | constants.O_DIRECT, writable) : -1 };
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

export function closeImage({ fd, directFd }: { fd: number; directFd: number }): void {
  closeSync(fd);
  if (directFd >= 0) closeSync(directFd);
}

/** The same for every path of the same file or device; undefined where there is none to be seen. */
export function identityOf(path: string): string | undefined {
  try {
    const stat = statSync(path);
    return stat.isBlockDevice() ? `device ${stat.rdev}` : `${stat.dev}:${stat.ino}`;
  } catch {
    return undefined;
  }
}

/** A DriveError of a system call's error. */
export function driveError(path: string, error: unknown): DriveError {
  const { code, message } = error as NodeJS.ErrnoException;
  return new DriveError(`${path}: ${code ?? message}`, { cause: error });
}

function checkKind(path: string): void {
  let stat: Stats;
  try {
    stat = statSync(path);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') throw new DriveError(`${path}: no such image; make one with: truncate -s 1G ${path}`);
    if (code === 'EACCES') throw new DriveError(`${path}: no permission to reach this image`);
    throw driveError(path, error);
  }
  checkStat(path, stat);
}

function checkStat(path: string, stat: Stats): void {
  if (stat.isDirectory()) throw new DriveError(`${path}: a directory; a drive needs an image file or a block device`);
  if (!stat.isFile() && !stat.isBlockDevice()) {
    throw new DriveError(`${path}: neither a regular file nor a block device; a drive needs one of these`);
  }
}

function open(path: string, flags: number, writable: boolean): number {
  try {
    return openSync(path, flags);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (writable && (code === 'EACCES' || code === 'EPERM' || code === 'EROFS')) {
      throw new DriveError(`${path}: this user may not write it; use it with readonly or with overlay=FILE`);
    }
    if (code === 'EACCES' || code === 'EPERM') throw new DriveError(`${path}: this user may not read it`);
    if (code === 'EBUSY') throw new DriveError(`${path}: in use by the host, perhaps mounted`);
    if (code === 'EINVAL' && flags & constants.O_DIRECT) {
      throw new DriveError(`${path}: its file system has no O_DIRECT; use it without cache=none`);
    }
    throw driveError(path, error);
  }
}

/** Lets another process open an image that this one goes on having open. */
export function unlockImage(fd: number): void {
  addon.ofdUnlock(fd);
}

/** Shared by readers, exclusive for a writer; it goes with the descriptor. @throws DriveError when another has it. */
export function lockImage(fd: number, path: string, writable: boolean): void {
  const results = writable
    ? [addon.ofdLock(fd, false, true, 0, 0)]
    : [
        addon.ofdLock(fd, false, false, 0, WRITER_BYTE),
        addon.ofdLock(fd, false, false, WRITER_BYTE + 1, 0),
        addon.ofdLock(fd, true, true, WRITER_BYTE, 1),
      ];
  // Any other failure is a file system without locks: they are a safeguard, not a condition.
  if (results.includes(-os.errno.EAGAIN)) {
    const remedy = writable ? 'end that one, or use readonly on both, or an overlay each' : 'end that one first';
    throw new DriveError(`${path}: in use by another machine${writable ? '' : ' that writes it'}; ${remedy}`);
  }
}

function describe(fd: number, path: string) {
  const stat = fstatSync(fd);
  checkStat(path, stat);
  const device = stat.isBlockDevice();
  const size = device ? deviceSize(fd, path) : stat.size;
  if (size === 0) throw new DriveError(`${path}: empty; give it a size with: truncate -s 1G ${path}`);
  if (size % SECTOR !== 0) {
    const remedy = `truncate -s ${Math.ceil(size / SECTOR) * SECTOR} ${path}`;
    throw new DriveError(`${path}: ${size} bytes are not a multiple of ${SECTOR}; grow it with: ${remedy}`);
  }
  const blockSize = device ? deviceInteger(fd, BLKSSZGET, SECTOR) : SECTOR;
  return {
    size,
    blockSize,
    physicalBlockSize: Math.max(blockSize, device ? deviceInteger(fd, BLKPBSZGET, SECTOR) : FILE_BLOCK),
    stat,
  };
}

function deviceSize(fd: number, path: string): number {
  const size = new BigUint64Array(1);
  const result = addon.ioctl(fd, BLKGETSIZE64, size);
  if (result < 0) throw new DriveError(`${path}: the host does not tell the size of this device`);
  return Number(size[0]);
}

function deviceInteger(fd: number, request: number, otherwise: number): number {
  const value = new Uint32Array(1);
  return addon.ioctl(fd, request, value) < 0 ? otherwise : (value[0] as number);
}
