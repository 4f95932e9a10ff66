import { spawn } from 'node:child_process';
import { closeSync, openSync, writeFileSync } from 'node:fs';
import { type ErrorData, errorFromData, errorToData, TsvisorError } from '../errors.js';
import { ERROR_EXIT } from './exit-codes.js';
import type { MachineStatus } from './machines/control-protocol.js';
import { cannotUse, checkName, generateName, MachineFolder, removeStale } from './machines/machine-folder.js';
import { olderPart } from './machines/rotating-log.js';
import { abortOnSignals } from './signals.js';

/** Tells the child of a `--detach` what it is: `FD:NAME`, the lock of its folder and its name. */
const VARIABLE = 'TSVISOR_DETACHED';
const LOCK_FD = 3;

/** What is printed of a machine that was left behind. */
export type Started = Pick<MachineStatus, 'name' | 'pid' | 'state'> &
  Partial<MachineStatus> & {
    /** Where it waits for what it is to run. */
    readonly address?: string;
  };

type ChildMessage = { readonly started: Started } | { readonly failed: ErrorData };

/** In the process that is left behind: the one that started it. */
export interface DetachedParent {
  /** The name that the parent took for this process. */
  readonly folder: MachineFolder;
  /** The guest runs, or is waited for: the parent returns. */
  started(status: Started | undefined): void;
  /** The parent says why, and returns; or, when it has returned, this is kept for `tsvisor ps` and `logs`. */
  failed(error: unknown): Promise<void>;
}

/** @returns undefined if this process is not the child of a `--detach`. */
export function detachedParent(): DetachedParent | undefined {
  const { [VARIABLE]: name } = process.env;
  if (name === undefined || !process.send) return undefined;
  delete process.env[VARIABLE]; // not of the processes that this one starts
  const folder = new MachineFolder(checkName(name), LOCK_FD);
  // A parent that goes before it knows that the guest runs was ended: so is this.
  const alone = () => process.kill(process.pid, 'SIGTERM');
  process.once('disconnect', alone);
  const tell = (message: ChildMessage) =>
    new Promise<void>((resolve) => {
      process.removeListener('disconnect', alone);
      if (process.connected) process.send?.(message, () => resolve());
      else resolve();
    });
  return {
    folder,
    started: (status) => {
      if (status) void tell({ started: status }).then(() => process.connected && process.disconnect());
    },
    failed: async (error) => {
      if (process.connected) await tell({ failed: errorToData(error) });
      else keepFailure(folder, errorToData(error).message, ERROR_EXIT[errorToData(error).code]);
    },
  };
}

/** How a detached machine failed, for `tsvisor ps` and `logs`. */
export interface Failure {
  readonly message: string;
  readonly exitCode: number;
  /** ISO 8601. */
  readonly at: string;
}

/** Keeps what there is to know about a failure, until the name is used again or `tsvisor stop` removes it. */
export function keepFailure(folder: MachineFolder, message: string, exitCode: number): void {
  const { failure, consoleLog, processLog } = folder.paths;
  const content: Failure = { message, exitCode, at: new Date().toISOString() };
  try {
    writeFileSync(failure, `${JSON.stringify(content)}\n`, { mode: 0o600, flag: 'wx' });
  } catch {
    return; // a full disk, or the folder is gone: then nothing is kept
  }
  folder.release({ keep: [failure, consoleLog, olderPart(consoleLog), processLog] });
}

/** `--detach`: starts the same command line in a session of its own and returns when its guest runs. */
export async function startDetached(args: { name?: string | undefined; json: boolean }): Promise<void> {
  using interrupt = abortOnSignals();
  const folder = await MachineFolder.claim(args.name ?? generateName());
  const status = await startInFolder(folder, process.argv.slice(1), interrupt.signal);
  const { name, address } = status;
  const line = address === undefined ? name : `${name} ${address}`;
  process.stdout.write(args.json ? `${JSON.stringify(status, null, 2)}\n` : `${line}\n`);
}

/**
 * Starts a command line in a session of its own, and returns when its guest runs.
 * @param folder of its machine: the process has it from now on.
 * @throws what the process said, or the signal's reason; then it is gone, and its folder with it.
 */
export async function startInFolder(
  folder: MachineFolder,
  args: readonly string[],
  signal: AbortSignal,
  environment: NodeJS.ProcessEnv = process.env,
): Promise<Started> {
  if (signal.aborted) folder.release();
  signal.throwIfAborted();
  const { name } = folder.paths;
  const log = openLog(folder);
  const child = spawn(process.execPath, args, {
    detached: true, // a session of its own, without a terminal
    stdio: ['ignore', 'ignore', log, folder.lock, 'ipc'],
    env: { ...environment, [VARIABLE]: name },
  });
  closeSync(log);
  folder.abandon();
  const onAbort = () => child.kill('SIGTERM');
  signal.addEventListener('abort', onAbort);
  const outcome = await new Promise<ChildMessage>((resolve) => {
    child.on('message', (message: ChildMessage) => resolve(message));
    child.on('error', (error) => resolve({ failed: errorToData(error) }));
    child.on('close', (code, signal) => {
      const why = `the process of machine ${name} ended before its guest ran (${signal ?? `exit ${code}`})`;
      resolve({ failed: errorToData(new TsvisorError('ERR_MACHINE_ENDED', why)) });
    });
  });
  signal.removeEventListener('abort', onAbort);
  if ('failed' in outcome || signal.aborted) {
    if (child.exitCode === null && child.signalCode === null)
      await new Promise((resolve) => child.on('close', resolve));
    removeStale(name); // one that was ended before it listened to signals
  }
  signal.throwIfAborted();
  if ('failed' in outcome) throw errorFromData(outcome.failed);
  child.unref();
  return outcome.started;
}

/** @throws TsvisorError ERR_OUTPUT */
function openLog(folder: MachineFolder): number {
  try {
    return openSync(folder.paths.processLog, 'wx', 0o600);
  } catch (error) {
    folder.release();
    throw cannotUse(folder.paths.folder, error);
  }
}
