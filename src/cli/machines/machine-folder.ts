import { randomBytes } from 'node:crypto';
import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  type Stats,
  statSync,
  unlinkSync,
  writeSync,
} from 'node:fs';
import { constants as os } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { errnoName, TsvisorError, UsageError } from '../../errors.js';
import { addon } from '../../kvm/addon.js';

/** Letters, digits and `_.-`, of which the first is a letter or digit: a file name, and no `:` (NAME:PATH). */
export const NAME = /^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$/;
const LOCK = 'lock';
/** Bytes of a Unix socket's path (struct sockaddr_un); Node cuts longer ones. */
const MAX_SOCKET_PATH = 107;
/** The kernel's PID_MAX_LIMIT. */
const MAX_PID = 4_194_304;
/** A lock may be held for a moment by who removes a stale folder. */
const CLAIM_TRIES = 10;
const CLAIM_PAUSE_MS = 50;

/** The paths in a machine's folder. */
export interface MachinePaths {
  readonly name: string;
  readonly folder: string;
  /** Control protocol: see control-protocol.ts. */
  readonly control: string;
  /** What the guest's console said last. */
  readonly consoleLog: string;
  /** stderr of a detached machine's process. */
  readonly processLog: string;
  /** How a detached machine failed. */
  readonly failure: string;
}

/** Who has a machine's folder: what is written to its lock file. */
export interface Holder {
  readonly pid: number;
  /** When that process started, in clock ticks since boot (proc(5), field 22 of stat): no other has both the same. */
  readonly startTime: number;
}

/** @throws UsageError */
export function checkName(name: string): string {
  if (NAME.test(name)) return name;
  throw new UsageError(
    `'${name}' is no name for a machine: 1 to 32 letters, digits and _.- of which the first is a letter or digit`,
  );
}

/** A name for a machine that was given none. */
export function generateName(): string {
  return `vm-${randomBytes(3).toString('hex')}`;
}

/** Where the machines of this user are: of one boot of the host, and nobody else's. */
function rootFolder(): string {
  const { XDG_RUNTIME_DIR } = process.env;
  return XDG_RUNTIME_DIR?.startsWith('/') ? join(XDG_RUNTIME_DIR, 'tsvisor') : `/tmp/tsvisor-${process.geteuid?.()}`;
}

export function pathsOf(name: string): MachinePaths {
  const folder = join(rootFolder(), checkName(name));
  const at = (file: string) => join(folder, file);
  return {
    name,
    folder,
    control: at('control.sock'),
    consoleLog: at('console.log'),
    processLog: at('process.log'),
    failure: at('failure.json'),
  };
}

/** Whether a machine of that name runs; it is not asked. */
export function isRunning(name: string): boolean {
  const { folder } = pathsOf(name);
  if (!isOurs(folder)) return false;
  const fd = openLock(folder, 0);
  if (fd === undefined) return false;
  try {
    return addon.ofdLock(fd, true, true, 0, 0) === -os.errno.EAGAIN;
  } finally {
    closeSync(fd);
  }
}

/** The process that runs a machine; undefined if that cannot be told or the process is another one by now. */
export function holderOf(name: string): Holder | undefined {
  try {
    const { pid, startTime } = JSON.parse(readFileSync(join(pathsOf(name).folder, LOCK), 'utf8'));
    return startTimeOf(pid) === startTime ? { pid, startTime } : undefined;
  } catch {
    return undefined;
  }
}

/** Names of the machines that run, and of those whose failure is kept. What a killed process left is removed. */
export async function listMachines(): Promise<{ running: string[]; failed: string[] }> {
  const root = rootFolder();
  if (!isOurs(root)) return { running: [], failed: [] };
  const names = readdirSync(root).filter((name) => NAME.test(name) && isOurs(join(root, name)));
  const running: string[] = [];
  const failed: string[] = [];
  for (const name of names.sort()) {
    if (isRunning(name)) running.push(name);
    else if (statSync(pathsOf(name).failure, { throwIfNoEntry: false })) failed.push(name);
    else removeStale(name);
  }
  return { running, failed };
}

/** Removes the folder of a machine that does not run. No effect on one that does. */
export function removeStale(name: string): void {
  try {
    tryClaim(name)?.release();
  } catch {
    // It went by itself, or it cannot be removed: then there is nothing to be done about it here.
  }
}

/** A machine's folder that this process has; it is the machine's name that is locked. */
export class MachineFolder {
  readonly paths: MachinePaths;
  /** The descriptor of the lock: whoever inherits it has the lock as well. */
  readonly lock: number;
  readonly #inode: number;
  #released = false;
  readonly #atExit = () => this.release();

  /** @param lock a descriptor that has the lock, of this process or inherited. */
  constructor(name: string, lock: number) {
    this.paths = pathsOf(name);
    this.lock = lock;
    this.#inode = fstatSync(lock).ino;
    const text = JSON.stringify({ pid: process.pid, startTime: startTimeOf(process.pid) });
    ftruncateSync(lock);
    writeSync(lock, text, 0);
    process.once('exit', this.#atExit);
  }

  /** Hybrid vsock's socket. No other process has it by that path: whoever ends must not remove the next one's. */
  get vsock(): string {
    return join(this.paths.folder, `vsock-${process.pid}.sock`);
  }

  /** Takes a name. What a process that is gone left of that name is removed. @throws UsageError when a machine has it. */
  static async claim(name: string): Promise<MachineFolder> {
    const longest = `${pathsOf(name).control}.${MAX_PID}`;
    if (Buffer.byteLength(longest) > MAX_SOCKET_PATH) {
      throw failed(pathsOf(name).folder, 'its path is too long for sockets; set XDG_RUNTIME_DIR to a shorter one');
    }
    makePrivate(rootFolder());
    for (let i = 0; i < CLAIM_TRIES; i++) {
      const folder = tryClaim(name);
      if (folder) return folder;
      await delay(CLAIM_PAUSE_MS);
    }
    throw new UsageError(`--name: a machine '${name}' runs already; take another name, or: tsvisor stop ${name}`);
  }

  /** Removes the folder, unless it is another machine's by now, and gives up the name. */
  release({ keep = [] as readonly string[] } = {}): void {
    if (this.#released) return;
    this.#released = true;
    process.removeListener('exit', this.#atExit);
    try {
      if (this.#isStillOurs()) {
        this.#clear(keep);
        if (keep.length === 0) {
          unlinkSync(join(this.paths.folder, LOCK));
          rmdirSync(this.paths.folder);
        }
      }
    } catch {
      // Somebody removed it, or its file system is read-only now: there is nothing left to do.
    }
    closeSync(this.lock);
  }

  /** For who hands the lock over to a child: gives up this process's part of it. */
  abandon(): void {
    this.#released = true;
    process.removeListener('exit', this.#atExit);
    closeSync(this.lock);
  }

  clear(): void {
    this.#clear([]);
  }

  #clear(keep: readonly string[]): void {
    const { folder } = this.paths;
    for (const entry of readdirSync(folder)) {
      const path = join(folder, entry);
      if (entry !== LOCK && !keep.includes(path)) rmSync(path, { recursive: true, force: true });
    }
  }

  #isStillOurs(): boolean {
    return statSync(join(this.paths.folder, LOCK), { throwIfNoEntry: false })?.ino === this.#inode;
  }
}

/** @returns undefined if somebody has it at the moment. */
function tryClaim(name: string): MachineFolder | undefined {
  const { folder } = pathsOf(name);
  makePrivate(folder);
  const fd = openLock(folder, constants.O_CREAT);
  if (fd === undefined) return undefined;
  try {
    const result = addon.ofdLock(fd, false, true, 0, 0);
    if (result < 0 && result !== -os.errno.EAGAIN) throw failed(folder, `its lock: ${errnoName(-result)}`);
    // The file that is locked may have been removed with a stale folder, and be another by now.
    const there = statSync(join(folder, LOCK), { throwIfNoEntry: false });
    if (result === 0 && there?.ino === fstatSync(fd).ino) {
      const claimed = new MachineFolder(name, fd);
      claimed.clear();
      return claimed;
    }
  } catch (error) {
    closeSync(fd);
    throw cannotUse(folder, error);
  }
  closeSync(fd);
  return undefined;
}

function openLock(folder: string, flags: number): number | undefined {
  try {
    return openSync(join(folder, LOCK), constants.O_RDWR | constants.O_NOFOLLOW | flags, 0o600);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return undefined;
    throw failed(folder, code ?? message);
  }
}

/** Makes a folder that is this user's alone, or checks that it is. @throws TsvisorError ERR_OUTPUT */
function makePrivate(folder: string): void {
  try {
    mkdirSync(folder, { mode: 0o700 });
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code !== 'EEXIST')
      throw failed(folder, code === 'ENOENT' ? 'the folder above it is missing' : (code ?? message));
  }
  const stat = lstatSync(folder, { throwIfNoEntry: false });
  if (stat && !isPrivate(stat)) throw failed(folder, 'it is not a folder of this user alone; remove it');
}

function isOurs(folder: string): boolean {
  const stat = lstatSync(folder, { throwIfNoEntry: false });
  return stat !== undefined && isPrivate(stat);
}

function isPrivate(stat: Stats): boolean {
  return stat.isDirectory() && stat.uid === process.geteuid?.() && (stat.mode & 0o077) === 0;
}

/** What is thrown for a file of a machine's folder that cannot be made or written, as on a full disk. */
export function cannotUse(folder: string, error: unknown): unknown {
  const { code, syscall } = error as NodeJS.ErrnoException;
  return syscall === undefined ? error : failed(folder, `${syscall}: ${code}`);
}

function failed(folder: string, reason: string): TsvisorError {
  return new TsvisorError('ERR_OUTPUT', `cannot use ${folder} for a machine's files: ${reason}`);
}

/** @returns undefined if there is no such process. */
function startTimeOf(pid: number): number | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]);
  } catch {
    return undefined;
  }
}
