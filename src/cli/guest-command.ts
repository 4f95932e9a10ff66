import { constants } from 'node:os';
import { finished } from 'node:stream/promises';
import type { SpawnOptions } from '../agent/exec.js';
import type { GuestProcess } from '../agent/process.js';
import { CLOSED_STDOUT_EXIT } from './exit-codes.js';
import { onSignals, SignalError } from './signals.js';
import { EscapeFilter, type EscapeKeys, rawTerminal } from './terminal.js';

/** The so-many-eth SIGINT or SIGTERM is not for the program in the guest any more: it seems not to heed them. */
const PATIENCE = 3;
const DEFAULT_SIZE = { rows: 24, columns: 80 };

export interface CommandOptions extends Omit<SpawnOptions, 'tty' | 'signal' | 'detached'> {
  /** Whether it has a terminal. Default: whether stdin and stdout are one. */
  readonly terminal?: boolean | undefined;
  /** Whether it gets this process's stdin. Default: with a terminal. */
  readonly stdin?: boolean | undefined;
  /** Keys that are not for the program, on a terminal. */
  readonly keys?: EscapeKeys;
}

/** Starts a program in a guest: Agent.spawn() or the machine's. */
export type Spawn = (command: string, options: SpawnOptions) => Promise<GuestProcess>;

/**
 * Runs a program in a guest with this process's streams, terminal and signals as its own. Whatever makes this process
 * leave the program ends that too: the agent does so when the connection is lost.
 * @returns the exit code of a shell that had run it: its own, or 128 and the signal that ended it.
 * @throws GuestError ERR_EXEC, TsvisorError ERR_TIMEOUT and those of the connection; SignalError.
 */
export async function runCommand(spawn: Spawn, command: string, options: CommandOptions): Promise<number> {
  const { stdin, stdout, stderr } = process;
  const { terminal = Boolean(stdin.isTTY && stdout.isTTY), stdin: wantsInput = terminal, keys, ...rest } = options;
  const leave = new AbortController();
  const left = new Promise<never>((_, reject) => {
    leave.signal.addEventListener('abort', () => reject(leave.signal.reason));
  });
  left.catch(() => {});
  const undo: (() => void)[] = [];
  let guest: GuestProcess | undefined;
  let asked = 0;
  undo.push(
    onSignals((code, signal) => {
      if (guest && signal !== 'SIGHUP' && ++asked < PATIENCE) guest.kill(signal).catch(() => {});
      else leave.abort(new SignalError(signal, code));
    }),
  );
  const onClosed = () => leave.abort(new ClosedStdout());
  stdout.on('error', onClosed);
  undo.push(() => stdout.off('error', onClosed));
  try {
    const starting = spawn(command, {
      ...rest,
      signal: leave.signal,
      ...(terminal && { tty: { ...sizeOf(stdout), ...(process.env.TERM && { term: process.env.TERM }) } }),
    });
    starting.catch(() => {}); // when it is left alone
    guest = await Promise.race([starting, left]);
    const started = guest;
    if (terminal) {
      const onResize = () => void started.resize(sizeOf(stdout)).catch(() => {}); // it may be gone
      stdout.on('resize', onResize);
      undo.push(() => stdout.off('resize', onResize));
    }
    if (wantsInput) {
      if (terminal && stdin.isTTY) undo.push(rawTerminal());
      const typed = keys && stdin.isTTY ? stdin.pipe(new EscapeFilter(keys, (text) => stderr.write(text))) : stdin;
      typed.pipe(started.stdin);
      stdin.on('error', () => started.stdin.end()); // one that cannot be read has ended
      undo.push(() => stdin.destroy());
    } else started.stdin.end();
    started.stdout.pipe(stdout, { end: false });
    started.stderr.pipe(stderr, { end: false });
    const shown = [started.stdout, started.stderr].map((stream) => finished(stream).catch(() => {}));
    const { code, signal } = await Promise.race([started.exited, left]);
    await Promise.race([Promise.all(shown), left]);
    return code ?? 128 + signalNumber(signal);
  } catch (error) {
    if (error instanceof ClosedStdout) return CLOSED_STDOUT_EXIT;
    throw error;
  } finally {
    for (const step of undo.reverse()) step();
  }
}

class ClosedStdout extends Error {}

function sizeOf({ rows, columns }: NodeJS.WriteStream): { rows: number; columns: number } {
  return rows > 0 && columns > 0 ? { rows, columns } : DEFAULT_SIZE;
}

/** @param signal a name of Node's, or `SIG34` for one that has none there. */
function signalNumber(signal: NodeJS.Signals | null): number {
  if (signal === null) return 0;
  return constants.signals[signal] ?? Number(signal.slice('SIG'.length));
}
