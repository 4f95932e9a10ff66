import { type BigIntStats, constants } from 'node:fs';
import { type FileHandle, lstat, open, readdir, readlink, stat } from 'node:fs/promises';
import { UsageError } from '../errors.js';
import type { Connection } from './connection.js';
import { type CopyOptions, type CopySummary, CopyTally, join } from './copy.js';
import { entryFrame } from './file-entry.js';
import { encodeFrame, FrameType, MAX_DATA, MAX_DEPTH } from './protocol.js';
import { upload } from './upload.js';

const NOTHING = Buffer.alloc(0);
const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK } = constants;

/** Sends a tree of the host to an agent that was asked to UNPACK it. */
export async function copyIn(connection: Connection, hostPath: string, options: CopyOptions): Promise<CopySummary> {
  if (typeof hostPath !== 'string' || hostPath === '') throw new UsageError('hostPath: must be a path');
  const tally = new CopyTally(options);
  await upload(connection, frames(Buffer.from(hostPath), tally));
  return tally.summary;
}

async function* frames(root: Buffer, tally: CopyTally): AsyncGenerator<Uint8Array> {
  // Only the root is followed if it is a link.
  const stats = await stat(root, { bigint: true });
  if (!stats.isDirectory() && !stats.isFile()) throw new UsageError(`${root}: is neither a file nor a directory`);
  yield* pack(root, stats, NOTHING, NOTHING, tally, 0);
  yield encodeFrame(FrameType.end);
}

/** @param place within the tree */
async function* pack(
  path: Buffer,
  stats: BigIntStats,
  name: Buffer,
  place: Buffer,
  tally: CopyTally,
  depth: number,
): AsyncGenerator<Uint8Array> {
  if (stats.isSymbolicLink()) {
    const target = await readlink(path, { encoding: 'buffer' });
    tally.entry('symlinks', place);
    yield frame(stats, name, target);
  } else if (stats.isFile()) {
    await using file = await open(path, O_RDONLY | O_NONBLOCK | (depth > 0 ? O_NOFOLLOW : 0));
    tally.entry('files', place);
    yield frame(stats, name, NOTHING);
    yield* contents(file, place, tally);
  } else if (stats.isDirectory()) {
    if (depth === MAX_DEPTH) throw new UsageError(`${path}: is more than ${MAX_DEPTH} folders deep`);
    tally.entry('directories', place);
    yield frame(stats, name, NOTHING);
    for (const child of await readdir(path, { encoding: 'buffer' })) {
      const childPath = join(path, child);
      yield* pack(childPath, await lstat(childPath, { bigint: true }), child, join(place, child), tally, depth + 1);
    }
    yield encodeFrame(FrameType.leave);
  } else {
    tally.entry('skipped', place);
  }
}

async function* contents(file: FileHandle, place: Buffer, tally: CopyTally): AsyncGenerator<Uint8Array> {
  for (;;) {
    const { bytesRead, buffer } = await file.read(Buffer.allocUnsafe(MAX_DATA), 0, MAX_DATA, null);
    if (bytesRead > 0) tally.data(bytesRead, place);
    yield encodeFrame(FrameType.data, buffer.subarray(0, bytesRead));
    if (bytesRead === 0) return;
  }
}

function frame(stats: BigIntStats, name: Buffer, target: Buffer): Buffer {
  const { mode, uid, gid, mtimeNs, size } = stats;
  const nanoseconds = ((mtimeNs % 1_000_000_000n) + 1_000_000_000n) % 1_000_000_000n;
  return entryFrame({
    mode: Number(mode),
    uid: Number(uid),
    gid: Number(gid),
    seconds: (mtimeNs - nanoseconds) / 1_000_000_000n,
    nanoseconds: Number(nanoseconds),
    size,
    name,
    target,
  });
}
