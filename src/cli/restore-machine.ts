import { dirname, resolve } from 'node:path';
import { UsageError } from '../errors.js';
import { Machine } from '../machine/machine.js';
import type { RestoreOptions } from '../snapshot/restore.js';
import { parseDriveOverrides } from './drive-option.js';
import { hostMachine, type MadeMachine } from './host-machine.js';
import { SharedFolder } from './machines/shared-folder.js';
import { parseNetworks } from './net-option.js';
import type { RestoreArguments, RestoredArguments } from './restore.js';
import { CONSOLE_PORT, parseStreams, type StreamOptions } from './streams.js';
import { parseVsock } from './vsock-option.js';

/** `tsvisor restore`. */
export async function restoreMachine(args: RestoreArguments): Promise<void> {
  SharedFolder.join();
  const folder = resolve(args.folder);
  const restored = parseRestored(args);
  await hostMachine(args, {
    make: async (named, options) => {
      const { track, verify, prefetch } = args;
      const given = { ...restored, track, verify, prefetch };
      const machine = await Machine.restore(folder, { ...given, ...options, vsockSocket: named?.vsock });
      try {
        return madeMachine(machine, args, { snapshot: folder, greeting: `goes on from ${args.folder}` });
      } catch (error) {
        await machine.close();
        throw error;
      }
    },
  });
}

/** @throws UsageError */
export function parseRestored(args: RestoredArguments): RestoreOptions {
  const drives = parseDriveOverrides(args.drive);
  const networks = args.net.length > 0 ? parseNetworks(args.net) : undefined;
  const vsock = parseVsock(args.vsock);
  parseStreams({ ...args, console: args.console ?? 'none' });
  return {
    ...(drives.length > 0 && { drives }),
    ...(networks && { networks }),
    ...(vsock && { vsock }),
    ...(args.hostname !== undefined && { hostname: args.hostname }),
  };
}

/** A machine that goes on, with its streams connected as they were or as the options say. @throws UsageError */
export function madeMachine(
  machine: Machine,
  args: RestoredArguments,
  { snapshot, greeting }: { readonly snapshot?: string; readonly greeting: string },
): MadeMachine {
  const { config } = machine;
  return {
    machine,
    streams: parseStreams(streamsFor(machine, args)),
    networks: parseNetworks(args.net),
    source: { kernel: config.kernel, ...(snapshot !== undefined && { snapshot }) },
    greeting: `${greeting}; Enter shows its prompt, Ctrl-A x ends it, Ctrl-A h helps`,
    forCommand: { progress: 'waiting for the guest’s agent', powersOff: keepsDrives(machine) },
  };
}

/** What the terminal stands for is what was the guest's console. @throws UsageError for what the machine has not */
function streamsFor({ config }: Machine, { serial, console, port }: RestoredArguments): StreamOptions {
  const hasConsole = config.consolePorts.some(({ name }) => name === CONSOLE_PORT);
  if (!hasConsole && console !== undefined && console !== 'none') throw lacks('--console', CONSOLE_PORT);
  if (!config.serial && serial !== undefined && serial !== 'none') throw lacks('--serial', 'ttyS0');
  for (const { name } of parseStreams({ console: 'none', port }).ports) {
    if (!config.consolePorts.some((port) => port.name === name)) throw lacks(`--port ${name}`, 'port of that name');
  }
  const isConsole = hasConsole && config.console === 'hvc0' && serial !== 'stdio';
  const chosen = { console: console ?? (isConsole ? 'stdio' : 'none'), port };
  return { ...chosen, serial: serial ?? (config.serial && chosen.console !== 'stdio' ? 'stdio' : 'none') };
}

function lacks(option: string, what: string): UsageError {
  return new UsageError(`${option}: the machine has no ${what}; leave it out`);
}

/** Whether any of what the guest writes outlives the machine. */
function keepsDrives({ config, scratch }: Machine): boolean {
  return config.drives.some(({ readOnly, file, overlay }) => !readOnly && !scratch.includes(dirname(overlay ?? file)));
}
