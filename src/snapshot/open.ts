import { constants } from 'node:fs';
import { type FileHandle, lstat, open } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { SnapshotError } from '../errors.js';
import type { MemoryLayer } from '../machine/guest-ram.js';
import { type CheckedState, decodeState, MEMORY_FILE, STATE_FILE, STATE_LIMIT } from './format.js';
import { verifyMemory } from './memory-checksums.js';
import { Prefetch } from './prefetch.js';

/** Snapshots that one may be based on: each is one more mapping of every page. */
const MAX_DEPTH = 32;

/** A memory file. */
interface MemoryFile {
  readonly file: FileHandle;
  readonly path: string;
  readonly checksums: Uint8Array | undefined;
}

/** A snapshot that is open: its state, and its memory's files from the oldest on. */
export class OpenSnapshot implements AsyncDisposable {
  readonly path: string;
  readonly state: CheckedState;
  readonly layers: readonly MemoryLayer[];
  #files: readonly MemoryFile[];

  private constructor(path: string, state: CheckedState, layers: readonly MemoryLayer[], files: readonly MemoryFile[]) {
    this.path = path;
    this.state = state;
    this.layers = layers;
    this.#files = files;
  }

  /**
   * Opens a snapshot, which may be anybody's. @param memory `state` does without its memory files.
   * @throws SnapshotError that names the file.
   */
  static async open(folder: string, memory: 'files' | 'state' = 'files'): Promise<OpenSnapshot> {
    const path = resolve(folder);
    const files: MemoryFile[] = [];
    const layers: MemoryLayer[] = [];
    try {
      const state = await readState(path);
      if (memory === 'state') return new OpenSnapshot(path, state, layers, files);
      for (let at = path, now = state; ; ) {
        const { size, parent, extents } = now.memory;
        const file = join(at, MEMORY_FILE);
        const memory = await openMemory(file, size);
        files.unshift({ file: memory, path: file, checksums: now.memoryChecksums });
        layers.unshift({ fd: memory.fd, extents });
        if (!parent) break;
        if (layers.length === MAX_DEPTH) {
          throw new SnapshotError(
            `${folder}: more than ${MAX_DEPTH} snapshots, each based on another; take a full one`,
          );
        }
        at = resolve(at, parent.path);
        now = await readState(at);
        if (now.id !== parent.id || now.checksum !== parent.checksum || now.memory.size !== size) {
          throw new SnapshotError(`${at}: not the snapshot that ${folder} is based on`);
        }
      }
      return new OpenSnapshot(path, state, layers, files);
    } catch (error) {
      await closeAll(files);
      throw error;
    }
  }

  /** Reads all memory files. @throws SnapshotError that names the file and where it is not what was written. */
  async verify(): Promise<void> {
    for (const { file, path, checksums } of this.#files) {
      if (!checksums) throw new SnapshotError(`${path}: cannot be verified: its snapshot has no checksums of it`);
      await verifyMemory(file, checksums, this.state.memory.size, path);
    }
  }

  /** What reads its memory files in the background, which are its from now on. */
  prefetch(): Prefetch {
    const files = this.#files.map(({ file }) => file);
    this.#files = [];
    return new Prefetch(files, this.state.memory.size);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await closeAll(this.#files);
  }
}

async function closeAll(files: readonly MemoryFile[]): Promise<void> {
  await Promise.all(files.map(({ file }) => file.close()));
}

/** Reads and checks a snapshot's state. @throws SnapshotError */
export async function readState(folder: string): Promise<CheckedState> {
  const path = join(folder, STATE_FILE);
  await using file = await openRegular(path);
  const { size } = await file.stat();
  if (size > STATE_LIMIT) throw new SnapshotError(`${path}: damaged: it has ${size} bytes`);
  const bytes = Buffer.alloc(size);
  for (let done = 0; done < size; ) {
    const { bytesRead } = await file.read(bytes, done, size - done, done);
    if (bytesRead === 0) throw new SnapshotError(`${path}: it became shorter while it was read`);
    done += bytesRead;
  }
  return decodeState(bytes, path);
}

/**
 * A file that is to be mapped. Who may write it could change the guest's memory at any time, and end this process by
 * making it shorter: that must be nobody but this user and root.
 */
async function openMemory(path: string, size: number): Promise<FileHandle> {
  const file = await openRegular(path);
  try {
    const stat = await file.stat();
    if (stat.size !== size) throw new SnapshotError(`${path}: damaged: it has ${stat.size} bytes instead of ${size}`);
    if (stat.uid !== 0 && stat.uid !== process.geteuid?.()) {
      throw new SnapshotError(
        `${path}: it belongs to another user, who could change it; restore a copy of the snapshot`,
      );
    }
    if (stat.mode & 0o022) throw new SnapshotError(`${path}: other users may change it; chmod go-w it, or copy it`);
    return file;
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** Not to wait for, or act on, whatever else may be at that path, and not to follow where a link leads. */
async function openRegular(path: string): Promise<FileHandle> {
  let file: FileHandle | undefined;
  try {
    if (!(await lstat(path)).isFile()) throw new SnapshotError(`${path}: not a regular file`);
    file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK | constants.O_NOCTTY);
    if (!(await file.stat()).isFile()) throw new SnapshotError(`${path}: not a regular file`);
    return file;
  } catch (error) {
    await file?.close();
    if (error instanceof SnapshotError) throw error;
    const { code, message } = error as NodeJS.ErrnoException;
    const what = code === 'ENOENT' ? 'there is no such file; a snapshot is a folder that has it' : (code ?? message);
    throw new SnapshotError(`${path}: ${what}`, { cause: error });
  }
}
