import { UsageError } from '../errors.js';
import type { MachineConfig } from '../machine/config.js';
import type { ConsolePortConfig } from '../machine/device-config.js';
import { type MachineEnd, type MachineStats, now } from '../machine/end.js';
import { Machine } from '../machine/machine.js';
import { buildDefaultGuest } from './default-guest.js';
import { type DetachedParent, detachedParent, keepFailure, startDetached } from './detach.js';
import { parseDrive } from './drive-option.js';
import { commandOf } from './exec.js';
import { runGuestCommand } from './guest-run.js';
import { createLog } from './log.js';
import { MachineFolder } from './machines/machine-folder.js';
import { type NamedConfig, NamedMachine } from './machines/named-machine.js';
import { chosenForwards, parseNetworks } from './net-option.js';
import { parseNumber, parseSeconds } from './number.js';
import { OutputFile } from './output-file.js';
import type { RunArguments } from './run.js';
import { Session } from './session.js';
import { parseSize } from './size.js';
import { CONSOLE_PORT, parseStreams } from './streams.js';
import { parseVsock } from './vsock-option.js';

/** `tsvisor run`: in this process, or in one of its own that is left behind. */
export async function runMachine(args: RunArguments): Promise<void> {
  if (args.detach && commandOf(args).length > 0) {
    throw new UsageError(
      '--detach: does not go with a command; detach the machine, then: tsvisor exec NAME -- COMMAND',
    );
  }
  if (args.json && !args.detach) throw new UsageError('--json: goes with --detach only');
  const parent = detachedParent();
  if (args.detach && !parent) return await startDetached(args);
  try {
    await runHere(args, parent);
  } catch (error) {
    await parent?.failed(error);
    throw error;
  }
}

async function runHere(args: RunArguments, parent: DetachedParent | undefined): Promise<void> {
  const timeout = args.timeout === undefined ? undefined : parseSeconds('timeout', args.timeout);
  const streams = parseStreams(args);
  const command = commandOf(args);
  const folder = parent?.folder ?? (args.name === undefined ? undefined : await MachineFolder.claim(args.name));
  const stats = args.stats === undefined ? undefined : new OutputFile('stats', args.stats);
  let failure: string | undefined;
  try {
    const options = await createLog(args.logLevel);
    const config = await configOf(args, streams, folder);
    await buildDefaultGuest(args);
    await using machine = await Machine.create(config, options);
    for (const line of chosenForwards(config.networks ?? [], machine.hostForwards)) {
      process.stderr.write(`tsvisor: ${line}\n`);
    }
    const session = new Session(machine, streams, {
      timeout,
      headless: parent !== undefined || command.length > 0,
      powersOff: config.agent && parent !== undefined,
    });
    await using named = folder && (await NamedMachine.serve(folder, machine, session, config, parent !== undefined));
    const { code, end } =
      command.length > 0
        ? await runGuestCommand(machine, session, command)
        : await session.run(() => parent?.started(named?.status()));
    const explained = end.reason === 'guest-exit' || end.reason === 'stopped' || command.length > 0;
    if (code !== 0 && !explained) process.stderr.write(`tsvisor: ${end.message}\n`);
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

async function configOf(
  args: RunArguments,
  streams: ReturnType<typeof parseStreams>,
  folder: MachineFolder | undefined,
): Promise<NamedConfig> {
  const { kernel, initrd } = args;
  // What nobody could ask for anything has no agent, which would take time to start.
  const agent = args.agent ?? (commandOf(args).length > 0 || (folder !== undefined && kernel === undefined));
  const vsock = parseVsock(args.vsock) ?? (folder && {});
  return {
    ...(kernel !== undefined && { kernel }),
    ...(initrd !== undefined && { initrd }),
    append: args.append ?? '',
    memory: parseSize('memory', args.memory),
    cpus: parseNumber('cpus', args.cpus, 'a number of vCPUs', 0, 1024),
    onReset: args.noReboot ? 'end' : 'restart',
    serial: streams.serial.target.kind !== 'none',
    consolePorts: consolePorts(streams),
    ...(streams.console.target.kind === 'stdio' ? { console: 'hvc0' } : {}),
    ...terminalOf(streams),
    networks: parseNetworks(args.net),
    drives: (args.drive ?? []).map(parseDrive),
    rng: args.rng,
    agent,
    ...(vsock && { vsock: folder ? { socket: folder.vsock, ...vsock } : vsock }),
    acpi: args.acpi,
  };
}

function consolePorts({ console, ports }: ReturnType<typeof parseStreams>): ConsolePortConfig[] {
  const terminal = console.target.kind === 'none' ? [] : [{ name: CONSOLE_PORT, console: true }];
  return [...terminal, ...ports.map(({ name }) => ({ name }))];
}

function terminalOf({ serial, console }: ReturnType<typeof parseStreams>): Pick<MachineConfig, 'terminal'> {
  const { stdin, stdout, env } = process;
  if ((serial.target.kind !== 'stdio' && console.target.kind !== 'stdio') || !stdin.isTTY || !stdout.isTTY) return {};
  return { terminal: { type: env.TERM || 'vt102', rows: stdout.rows, columns: stdout.columns } };
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
