import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { type FileHandle, mkdir, open, readdir, rename, rm, writeFile } from 'node:fs/promises';
import { cpus, release } from 'node:os';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { SnapshotError, TsvisorError } from '../errors.js';
import type { ResolvedConfig } from '../machine/config.js';
import type { ControlAnswer, SavedMachine } from '../machine/messages.js';
import type { ThreadLink } from '../machine/thread-link.js';
import { packageVersion } from '../package-version.js';
import { bytesToState } from '../state-reader.js';
import { captureDisks } from './disks.js';
import { referenceTo } from './file-reference.js';
import { type BootFiles, encodeState, MEMORY_FILE, type SnapshotState, STATE_FILE } from './format.js';
import { memoryChecksumsOf } from './memory-checksums.js';
import { readState } from './open.js';

/** What a snapshot is to hold. */
export interface SnapshotOptions {
  /**
   * What becomes of drives that the guest may write: `copy` (default) copies what it wrote into the snapshot, so that the
   * machine can go on; `reference` only notes which files they are, which must then stay as they are: for a machine that
   * is stopped by `stop`. Read-only drives are always noted.
   */
  readonly disks?: 'copy' | 'reference';
  /**
   * Whether only the memory that was written since this machine's last snapshot (or since it was restored with
   * `track`) is written, beside a reference to that one, which must stay where it is. Default false.
   */
  readonly differential?: boolean;
  /** Whether to note what is written from now on, for a differential snapshot later. Default: as `differential`. */
  readonly track?: boolean;
  /** Whether the machine ends with the snapshot. Default false: it goes on. */
  readonly stop?: boolean;
  /** Gives the snapshot up when it aborts, with its reason: nothing is left of it, and the machine goes on. */
  readonly signal?: AbortSignal;
}

/** What was written. */
export interface SnapshotInfo {
  /** Its folder. */
  readonly path: string;
  /** 32 hexadecimal digits, of its own. */
  readonly id: string;
  /** Bytes of memory that were written, holes not counted. */
  readonly memoryBytes: number;
  /** Milliseconds for which the guest stood still. */
  readonly pauseMs: number;
}

/** What is known of the machine that is saved. */
export interface SnapshotSource {
  readonly link: Pick<ThreadLink, 'request'>;
  readonly config: ResolvedConfig;
  /** What can be given to a machine again, without functions. */
  readonly portable: object;
  /** The snapshot that tracked pages are counted from. */
  readonly base: { readonly path: string; readonly id: string } | undefined;
  /** Called when tracking begins anew: what was noted since `base` is gone, whatever becomes of the snapshot. */
  readonly saving?: () => void;
}

/**
 * Writes a snapshot: its folder appears complete or not at all.
 * @param folder does not exist, or is empty. @throws SnapshotError, ERR_MACHINE_STATE
 */
export async function takeSnapshot(
  source: SnapshotSource,
  folder: string,
  options: SnapshotOptions,
): Promise<SnapshotInfo> {
  const path = resolve(folder);
  if (existsSync(path) && (await readdir(path).catch(() => ['?'])).length > 0) {
    throw new SnapshotError(`${folder}: exists already; name a folder that does not`);
  }
  options.signal?.throwIfAborted();
  const { base } = source;
  if (options.differential && !base) {
    throw new SnapshotError('snapshot: a differential one needs one before it, taken with track: true');
  }
  const temporary = join(dirname(path), `.${basename(path)}.${randomBytes(6).toString('hex')}.tmp`);
  try {
    await mkdir(temporary, { mode: 0o700 });
    return await write(source, temporary, path, options);
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    options.signal?.throwIfAborted();
    if (error instanceof TsvisorError) throw error;
    throw new SnapshotError(`${folder}: the snapshot cannot be written: ${reasonOf(error, path)}`, { cause: error });
  }
}

function reasonOf(error: unknown, path: string): string {
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === 'ENOENT') return `there is no folder ${dirname(path)}`;
  if (code === 'ENOSPC') return 'the disk is full';
  return code ?? message;
}

async function write(
  source: SnapshotSource,
  temporary: string,
  path: string,
  options: SnapshotOptions,
): Promise<SnapshotInfo> {
  const memory = await open(join(temporary, MEMORY_FILE), 'wx+', 0o600);
  try {
    await memory.truncate(source.config.memory);
    const { state, memoryBytes, pauseMs } = await capture(source, memory.fd, temporary, path, options);
    try {
      // The guest runs again: its pause is not longer for these.
      const memoryChecksums = bytesToState(await memoryChecksumsOf(memory, state.memory.size));
      const bytes = encodeState({ ...state, memoryChecksums });
      await writeFile(join(temporary, STATE_FILE), bytes, { flag: 'wx', mode: 0o600, flush: true });
      await memory.sync();
      await syncFolder(temporary);
      options.signal?.throwIfAborted();
      await rename(temporary, path);
      await syncFolder(dirname(path));
    } catch (error) {
      if (options.stop) await letGo(source.link); // it goes on after all
      throw error;
    }
    return { path, id: state.id, memoryBytes, pauseMs };
  } finally {
    await memory.close();
  }
}

/**
 * Saves a machine. It goes on when this is done, unless that went well and it is to stop.
 * @param memory open for writing, as long as RAM. @param disks folder for copies. @param path where both will be.
 */
export async function capture(
  { link, config, portable, base, saving }: SnapshotSource,
  memory: number,
  disks: string,
  path: string,
  options: SnapshotOptions,
): Promise<{ state: SnapshotState; memoryBytes: number; pauseMs: number }> {
  const { disks: mode = 'copy', differential = false, track = differential, stop = false, signal } = options;
  const parent = differential && base ? await parentFrom(path, base) : undefined;
  const began = performance.now();
  let pauseMs = 0;
  let goesOn = true;
  let saved: SavedMachine;
  let captured: SnapshotState['disks'];
  await link.request({ command: 'hold' });
  try {
    captured = await captureDisks(config.drives, mode, disks, signal);
    signal?.throwIfAborted();
    const pages = differential ? 'dirty' : 'all';
    saving?.();
    saved = savedBy(await link.request({ command: 'save', save: { fd: memory, pages, track } }));
    goesOn = !stop;
  } finally {
    if (goesOn) await letGo(link);
    pauseMs = performance.now() - began;
  }
  const boot = bootFiles(config);
  const state: SnapshotState = {
    id: randomBytes(16).toString('hex'),
    created: new Date().toISOString(),
    host: { cpu: cpus()[0]?.model ?? '', kernel: release(), tsvisor: packageVersion() },
    config: portable,
    ...(boot && { boot }),
    disks: captured,
    memory: { size: config.memory, ...(parent && saved.extents && { parent, extents: saved.extents }) },
    machine: saved.machine,
  };
  return { state, memoryBytes: saved.bytes, pauseMs };
}

/** @throws SnapshotError when the snapshot that this one is based on is not there any more. */
async function parentFrom(path: string, base: { readonly path: string; readonly id: string }) {
  const { id, checksum } = await readState(base.path);
  if (id !== base.id) throw new SnapshotError(`${base.path}: not the snapshot any more that this one is based on`);
  return { path: relative(path, base.path), id, checksum };
}

/** What the guest is booted from when it resets itself; undefined when it is not, or when a file is gone. */
export function bootFiles({ kernel, initrd, agentProgram, onReset }: ResolvedConfig): BootFiles | undefined {
  if (onReset === 'end') return undefined;
  try {
    return {
      kernel: referenceTo(kernel),
      ...(initrd !== undefined && { initrd: referenceTo(initrd) }),
      ...(agentProgram !== undefined && { agentProgram: referenceTo(agentProgram) }),
    };
  } catch {
    return undefined;
  }
}

/** The guest goes on, unless it has ended. */
async function letGo(link: SnapshotSource['link']): Promise<void> {
  await link.request({ command: 'release' }).catch(() => {});
}

function savedBy({ saved }: ControlAnswer): SavedMachine {
  if (!saved) throw new TsvisorError('ERR_INTERNAL', 'the machine thread saved nothing');
  return saved;
}

async function syncFolder(path: string): Promise<void> {
  let folder: FileHandle | undefined;
  try {
    folder = await open(path, 'r');
    await folder.sync();
  } finally {
    await folder?.close();
  }
}
