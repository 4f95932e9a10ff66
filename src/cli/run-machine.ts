import { resolve } from 'node:path';
import type { MachineConfig } from '../machine/config.js';
import type { ConsolePortConfig } from '../machine/device-config.js';
import { MAX_CPUS } from '../machine/layout.js';
import { Machine } from '../machine/machine.js';
import { buildDefaultGuest } from './default-guest.js';
import { parseDrive } from './drive-option.js';
import { commandOf } from './exec.js';
import { hostMachine } from './host-machine.js';
import type { MachineFolder } from './machines/machine-folder.js';
import { parseNetworks } from './net-option.js';
import { parseNumber } from './number.js';
import type { RunArguments } from './run.js';
import { parseSize } from './size.js';
import { CONSOLE_PORT, parseStreams, type StreamRequests } from './streams.js';
import { parseVsock } from './vsock-option.js';

/** `tsvisor run`. */
export async function runMachine(args: RunArguments): Promise<void> {
  const streams = parseStreams(args);
  const cpus = parseNumber('cpus', args.cpus, `a number of vCPUs from 1 to ${MAX_CPUS}`, 1, MAX_CPUS);
  await hostMachine(args, {
    prepare: () => buildDefaultGuest({ ...args, cpus }),
    make: async (folder, options) => {
      const config = { ...configOf(args, streams, folder), cpus };
      return {
        machine: await Machine.create(config, options),
        streams,
        networks: config.networks ?? [],
        source: { kernel: args.kernel === undefined ? 'default' : resolve(args.kernel) },
        forCommand: { progress: 'booting', powersOff: true },
      };
    },
  });
}

function configOf(args: RunArguments, streams: StreamRequests, folder: MachineFolder | undefined): MachineConfig {
  const { kernel, initrd } = args;
  // What nobody could ask for anything has no agent, which would take time to start.
  const agent = args.agent ?? (commandOf(args).length > 0 || (folder !== undefined && kernel === undefined));
  const vsock = parseVsock(args.vsock) ?? (folder && {});
  return {
    ...(kernel !== undefined && { kernel }),
    ...(initrd !== undefined && { initrd }),
    append: args.append ?? '',
    memory: parseSize('memory', args.memory),
    vcpuThreads: args.vcpuThreads,
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

function consolePorts({ console, ports }: StreamRequests): ConsolePortConfig[] {
  const terminal = console.target.kind === 'none' ? [] : [{ name: CONSOLE_PORT, console: true }];
  return [...terminal, ...ports.map(({ name }) => ({ name }))];
}

function terminalOf({ serial, console }: StreamRequests): Pick<MachineConfig, 'terminal'> {
  const { stdin, stdout, env } = process;
  if ((serial.target.kind !== 'stdio' && console.target.kind !== 'stdio') || !stdin.isTTY || !stdout.isTTY) return {};
  return { terminal: { type: env.TERM || 'vt102', rows: stdout.rows, columns: stdout.columns } };
}
