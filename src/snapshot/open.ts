import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { SnapshotError } from '../errors.js';
import type { MemoryLayer } from '../machine/guest-ram.js';
import { type CheckedState, decodeState, MEMORY_FILE, STATE_FILE, STATE_LIMIT } from './format.js';
import { verifyMemory } from './memory-checksums.js';

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
  readonly #files: readonly MemoryFile[];

  private constructor(path: string, state: CheckedState, layers: readonly MemoryLayer[], files: readonly MemoryFile[]) {
    this.path = path;
    this.state = state;
    this.layers = layers;
    this.#files = files;
  }

  /** Opens a snapshot, which may be anybody's. @throws SnapshotError that names the file. */
  static async open(folder: string): Promise<OpenSnapshot> {
    const path = resolve(folder);
    const files: MemoryFile[] = [];
    const layers: MemoryLayer[] = [];
    try {
      const state = await readState(path);
      for (let at = path, now = state; ; ) {
        const file = join(at, MEMORY_FILE);
        const memory = await openRegular(file);
        files.unshift({ file: memory, path: file, checksums: now.memoryChecksums });
        const { size, parent, extents } = now.memory;
        const length = (await memory.stat()).size;
        if (length !== size) {
          throw new SnapshotError(`${file}: damaged: it has ${length} bytes instead of ${size}`);
        }
        layers.unshift({ fd: memory.fd, extents });
        if (!parent) break;
        if (layers.length === MAX_DEPTH) {
          throw new SnapshotError(
            `${folder}: more than ${MAX_DEPTH} snapshots, each based on another; take a full one`,
          );
        }
        at = resolve(at, parent.path);
        now = await readState(at);
        if (now.id !== parent.id || now.memory.size !== size) {
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

  async [Symbol.asyncDispose](): Promise<void> {
    await closeAll(this.#files);
  }
}

async function closeAll(files: readonly MemoryFile[]): Promise<void> {
  await Promise.all(files.map(({ file }) => file.close()));
}

async function readState(folder: string): Promise<CheckedState> {
  const path = join(folder, STATE_FILE);
  await using file = await openRegular(path);
  const { size } = await file.stat();
  if (size > STATE_LIMIT) throw new SnapshotError(`${path}: damaged: it has ${size} bytes`);
  return decodeState(await file.readFile(), path);
}

/** Not to wait for, or act on, whatever else may be at that path. */
async function openRegular(path: string): Promise<FileHandle> {
  let file: FileHandle | undefined;
  try {
    file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOCTTY);
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
