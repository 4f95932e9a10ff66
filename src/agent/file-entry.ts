import { constants } from 'node:fs';
import { FrameType, FrameWriter, PayloadReader, violation } from './protocol.js';

/** What kind of file a file is. */
export type FileType = 'file' | 'directory' | 'symlink' | 'fifo' | 'socket' | 'character-device' | 'block-device';

/** A file of the guest. */
export interface FileEntry {
  readonly name: string;
  readonly type: FileType;
  /** Permission bits, 0 to 0o7777. */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  /** Bytes. */
  readonly size: number;
  readonly modified: Date;
  /** Where a symbolic link leads. */
  readonly target?: string;
}

/** An entry as it is sent: names are bytes, times to the nanosecond. */
export interface RawEntry {
  /** Type and permissions, as of stat(2). */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly seconds: bigint;
  readonly nanoseconds: number;
  readonly size: bigint;
  readonly name: Buffer;
  readonly target: Buffer;
}

const types: ReadonlyMap<number, FileType> = new Map([
  [constants.S_IFREG, 'file'],
  [constants.S_IFDIR, 'directory'],
  [constants.S_IFLNK, 'symlink'],
  [constants.S_IFIFO, 'fifo'],
  [constants.S_IFSOCK, 'socket'],
  [constants.S_IFCHR, 'character-device'],
  [constants.S_IFBLK, 'block-device'],
]);

export function readRawEntry(payload: Buffer): RawEntry {
  const reader = new PayloadReader(payload);
  const [mode, uid, gid, nanoseconds] = [reader.u32(), reader.u32(), reader.u32(), reader.u32()];
  const seconds = reader.i64();
  const size = reader.u64();
  const entry = { mode, uid, gid, nanoseconds, seconds, size, name: reader.bytes(), target: reader.bytes() };
  reader.end();
  if (nanoseconds > 999_999_999) throw violation('a time of more than a second');
  return entry;
}

/** @throws AgentError for a type that there is not */
export function fileType(mode: number): FileType {
  const type = types.get(mode & constants.S_IFMT);
  if (!type) throw violation('a file of no known type');
  return type;
}

export function readEntry(payload: Buffer): FileEntry {
  const { mode, uid, gid, seconds, nanoseconds, size, name, target } = readRawEntry(payload);
  const type = fileType(mode);
  return {
    name: name.toString(),
    type,
    mode: mode & 0o7777,
    uid,
    gid,
    size: Number(size),
    modified: new Date(Number(seconds) * 1000 + Math.floor(nanoseconds / 1e6)),
    ...(type === 'symlink' ? { target: target.toString() } : {}),
  };
}

export function entryFrame(entry: RawEntry): Buffer {
  return new FrameWriter(FrameType.entry)
    .u32(entry.mode)
    .u32(entry.uid)
    .u32(entry.gid)
    .u32(entry.nanoseconds)
    .u64(entry.seconds)
    .u64(entry.size)
    .string(entry.name, 'the name of a file')
    .string(entry.target, 'the target of a link')
    .frame();
}
