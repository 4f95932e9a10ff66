import { UsageError } from '../errors.js';
import type { NetworkConfig } from '../machine/device-config.js';
import { type MachineEnd, type MachineStats, now } from '../machine/end.js';
import type { Machine, MachineOptions } from '../machine/machine.js';
import { type DetachedParent, detachedParent, keepFailure, startDetached } from './detach.js';
import { commandOf } from './exec.js';
import { type ForCommand, runGuestCommand } from './guest-run.js';
import { createLog, type LogLevel } from './log.js';
import { MachineFolder } from './machines/machine-folder.js';
import { type MachineSource, NamedMachine } from './machines/named-machine.js';
import { chosenForwards } from './net-option.js';
import { parseSeconds } from './number.js';
import { OutputFile } from './output-file.js';
import { Session } from './session.js';
import { abortOnSignals, SignalError } from './signals.js';
import type { StreamRequests } from './streams.js';

/** Options of every command whose process has a machine; see hostOptions(). */
export interface HostArguments {
  readonly name?: string | undefined;
  readonly detach: boolean;
  readonly json: boolean;
  readonly stats?: string | undefined;
  readonly timeout?: string | undefined;
  readonly logLevel: LogLevel;
}

/** How a command comes by its machine. */
export interface MachineMaker {
  /** What takes long, before a process is left behind: here its progress is seen. */
  prepare?(): Promise<void>;
  /** @param folder of a machine that has a name */
  make(folder: MachineFolder | undefined, options: MachineOptions, announce: Announce): Promise<MadeMachine>;
}

/** For what waits for its machine: says where. */
export type Announce = (address: string) => void;

/** A machine that does not run yet. */
export interface MadeMachine {
  readonly machine: Machine;
  readonly streams: StreamRequests;
  /** As they were asked for. */
  readonly networks: readonly NetworkConfig[];
  readonly source: MachineSource;
  /** How a person is told that the machine goes on, where a guest that boots would tell that itself. */
  readonly greeting?: string;
  readonly forCommand: ForCommand;
}

/** Hosts a machine until it ends: in this process, or in one of its own that is left behind. */
export async function hostMachine(args: HostArguments, maker: MachineMaker): Promise<void> {
  if (args.detach && commandOf(args).length > 0) {
    throw new UsageError(
      '--detach: does not go with a command; detach the machine, then: tsvisor exec NAME -- COMMAND',
    );
  }
  if (args.json && !args.detach) throw new UsageError('--json: goes with --detach only');
  const parent = detachedParent();
  if (args.detach && !parent) {
    await maker.prepare?.();
    return await startDetached(args);
  }
  try {
    await hostHere(args, maker, parent);
  } catch (error) {
    if (!(error instanceof SignalError)) await parent?.failed(error);
    throw error;
  }
}

async function hostHere(args: HostArguments, maker: MachineMaker, parent: DetachedParent | undefined): Promise<void> {
  const timeout = args.timeout === undefined ? undefined : parseSeconds('timeout', args.timeout);
  const command = commandOf(args);
  const folder = parent?.folder ?? (args.name === undefined ? undefined : await MachineFolder.claim(args.name));
  const stats = args.stats === undefined ? undefined : new OutputFile('stats', args.stats);
  let failure: string | undefined;
  try {
    const options = await createLog(args.logLevel);
    await maker.prepare?.();
    const announce = (address: string) => {
      const name = folder?.paths.name ?? '';
      if (parent) parent.started({ name, pid: process.pid, state: 'receiving', address });
      else process.stderr.write(`tsvisor: waits at ${address}\n`);
    };
    const made = await make(maker, folder, options, announce);
    await using machine = made.machine;
    for (const line of chosenForwards(made.networks, machine.hostForwards)) {
      process.stderr.write(`tsvisor: ${line}\n`);
    }
    const headless = parent !== undefined || command.length > 0;
    const { agent } = machine.config;
    const session = new Session(machine, made.streams, {
      timeout,
      headless,
      powersOff: agent && parent !== undefined,
    });
    await using named =
      folder && (await NamedMachine.serve(folder, machine, session, made.source, parent !== undefined));
    if (made.greeting !== undefined && !headless && process.stdin.isTTY) {
      process.stderr.write(`tsvisor: ${made.greeting}\n`);
    }
    const { code, end } =
      command.length > 0
        ? await runGuestCommand(machine, session, command, made.forCommand)
        : await session.run(() => parent?.started(named?.status()));
    const explained = end.reason === 'guest-exit' || end.reason === 'stopped' || command.length > 0;
    const moved = end.reason === 'migrated' && parent === undefined;
    if (moved || (code !== 0 && !explained)) process.stderr.write(`tsvisor: ${end.message}\n`);
    const numbers = await machine.metrics();
    stats?.commit(`${JSON.stringify(report(numbers, end, code), null, 2)}\n`);
    process.exitCode = code;
    if (parent && code !== 0 && end.reason !== 'stopped') failure = end.message;
  } finally {
    stats?.discard();
    // Otherwise the folder goes with the process: an error is told first.
    if (folder && failure !== undefined) keepFailure(folder, failure, Number(process.exitCode));
  }
}

/** A signal in the middle of it leaves nothing behind: no file of the machine, no folder of its name. */
async function make(
  maker: MachineMaker,
  folder: MachineFolder | undefined,
  options: MachineOptions,
  announce: Announce,
): Promise<MadeMachine> {
  using interrupt = abortOnSignals();
  const { signal } = interrupt;
  const made = await maker.make(folder, { ...options, signal }, announce);
  if (signal.aborted) await made.machine.close();
  signal.throwIfAborted();
  return made;
}

/** The JSON of --stats; times in ms since this process started. */
function report(stats: MachineStats, end: MachineEnd, code: number): object {
  const start = now() - process.uptime() * 1e3;
  const since = (times: Readonly<Record<string, number | undefined>>) =>
    Object.fromEntries(Object.entries(times).map(([name, at]) => [name, Number(((at ?? 0) - start).toFixed(3))]));
  return {
    phases: since(stats.phases),
    milestones: since(stats.milestones),
    exits: stats.exits,
    assists: stats.assists,
    devices: stats.devices,
    peakRssBytes: process.resourceUsage().maxRSS * 1024,
    end: { reason: end.reason, code, message: end.message },
  };
}
