import { randomUUID } from 'node:crypto';
import { constants } from 'node:fs';
import { chmod, lstat, lutimes, mkdir, open, rename, rm, stat, symlink, utimes } from 'node:fs/promises';
import { dirname } from 'node:path';
import { UsageError } from '../errors.js';
import type { Connection } from './connection.js';
import { type CopyOptions, type CopySummary, CopyTally, join } from './copy.js';
import { fileType, type RawEntry, readRawEntry } from './file-entry.js';
import { frameError } from './guest-error.js';
import { FrameType, MAX_DEPTH, violation } from './protocol.js';

const NOTHING = Buffer.alloc(0);
const { O_WRONLY, O_CREAT, O_EXCL, O_NOFOLLOW } = constants;

/** A folder that is being filled. Its mode and time are set when all is in it. */
interface Level {
  readonly path: Buffer;
  /** Within the tree. */
  readonly place: Buffer;
  readonly entry: RawEntry;
}

/**
 * Writes the tree that an agent sends which was asked to PACK it. The guest names single components, and every folder on
 * the way is one that this copy has made or looked at: there is no name that leads elsewhere.
 */
export async function copyOut(connection: Connection, hostPath: string, options: CopyOptions): Promise<CopySummary> {
  if (typeof hostPath !== 'string' || hostPath === '' || hostPath.includes('\0'))
    throw new UsageError('hostPath: must be a path');
  const receiver = new TreeReceiver(connection, hostPath, new CopyTally(options));
  return await receiver.run();
}

class TreeReceiver {
  readonly #connection: Connection;
  readonly #root: string;
  readonly #tally: CopyTally;
  readonly #levels: Level[] = [];

  constructor(connection: Connection, root: string, tally: CopyTally) {
    this.#connection = connection;
    this.#root = root;
    this.#tally = tally;
  }

  async run(): Promise<CopySummary> {
    await this.#entry(await this.#next(FrameType.entry));
    while (this.#levels.length > 0) {
      const frame = await this.#connection.expect();
      if (frame.type === FrameType.leave && frame.payload.length === 0) await this.#leave();
      else if (frame.type === FrameType.entry) await this.#entry(frame.payload);
      else throw frameError('ERR_GUEST_FILE', frame);
    }
    await this.#next(FrameType.end);
    return this.#tally.summary;
  }

  async #next(type: number): Promise<Buffer> {
    const frame = await this.#connection.expect();
    if (frame.type !== type) throw frameError('ERR_GUEST_FILE', frame);
    return frame.payload;
  }

  async #entry(payload: Buffer): Promise<void> {
    const entry = readRawEntry(payload);
    const level = this.#levels.at(-1);
    if (level ? !isName(entry.name) : entry.name.length > 0) throw violation('a name that leads elsewhere');
    const path = level ? join(level.path, entry.name) : Buffer.from(this.#root);
    const place = level ? join(level.place, entry.name) : NOTHING;
    switch (fileType(entry.mode)) {
      case 'directory':
        if (this.#levels.length === MAX_DEPTH) throw violation(`more than ${MAX_DEPTH} folders in each other`);
        this.#tally.entry('directories', place);
        await makeFolder(path, level === undefined);
        this.#levels.push({ path, place, entry });
        break;
      case 'file':
        this.#tally.entry('files', place);
        if (!level) await mkdir(dirname(this.#root), { recursive: true });
        await this.#file(path, place, entry);
        break;
      case 'symlink':
        if (!level) throw violation('a root that is a link'); // it was to follow it
        if (entry.target.length === 0) throw violation('a link that leads nowhere');
        this.#tally.entry('symlinks', place);
        await removeFile(path);
        await symlink(entry.target, path);
        await lutimes(path, ...times(entry));
        break;
      default:
        this.#tally.entry('skipped', place);
    }
  }

  async #leave(): Promise<void> {
    const level = this.#levels.pop();
    if (!level) return;
    await chmod(level.path, permissions(level.entry));
    await utimes(level.path, ...times(level.entry));
  }

  /** Written under another name first: what was there is replaced whole, and a link there is not followed. */
  async #file(path: Buffer, place: Buffer, entry: RawEntry): Promise<void> {
    const folder = this.#levels.at(-1)?.path ?? Buffer.from(dirname(this.#root));
    const temporary = join(folder, Buffer.from(`.tsvisor-${randomUUID()}`));
    const file = await open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600);
    try {
      for (;;) {
        const data = await this.#next(FrameType.data);
        if (data.length === 0) break;
        this.#tally.data(data.length, place);
        await file.writeFile(data);
      }
      await file.chmod(permissions(entry));
      await file.utimes(...times(entry));
      await file.close();
      await rename(temporary, path);
    } catch (error) {
      await file.close().catch(() => {});
      await rm(temporary, { force: true });
      throw error;
    }
  }
}

/** A single component. */
function isName(name: Buffer): boolean {
  const text = name.toString('latin1');
  return text !== '' && text !== '.' && text !== '..' && !text.includes('/');
}

/** Without setuid and setgid: the guest's programs are not to run with the rights of the host's user. */
function permissions(entry: RawEntry): number {
  return entry.mode & 0o777;
}

/** As text: a number below 0 is the present to Node, not a time before 1970. */
function times(entry: RawEntry): [string, string] {
  const seconds = String(Number(entry.seconds) + entry.nanoseconds / 1e9);
  return [seconds, seconds];
}

/** Only the root, which the caller named, may be a link to a folder. */
async function makeFolder(path: Buffer, root: boolean): Promise<void> {
  try {
    await mkdir(path, { mode: 0o700, recursive: root });
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'EEXIST')) throw error;
    const stats = root ? await stat(path) : await lstat(path);
    if (stats.isDirectory()) return;
    if (root) throw error;
    await rm(path);
    await mkdir(path, { mode: 0o700 });
  }
}

async function removeFile(path: Buffer): Promise<void> {
  await rm(path, { force: true });
}
