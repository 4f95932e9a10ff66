import { readFileSync } from 'node:fs';
import type { ArgumentsCamelCase, Argv } from 'yargs';
import { ask } from './machines/control-client.js';
import type { MachineStatus } from './machines/control-protocol.js';
import { holderOf, listMachines, pathsOf } from './machines/machine-folder.js';
import { formatSize } from './size.js';

/** How long a machine has to say how it is, in milliseconds. */
const PATIENCE_MS = 2000;

export function builder(yargs: Argv) {
  return yargs
    .option('json', { type: 'boolean', default: false, describe: 'one JSON object on stdout' })
    .option('quiet', { alias: 'q', type: 'boolean', default: false, describe: 'names of running machines alone' })
    .example('$0 ps', 'the machines of this user that have a name, and the detached ones that failed')
    .example('$0 ps -q | xargs -rn1 $0 stop', 'stop them all')
    .example("$0 ps --json | jq '.machines[].name'", 'for a script');
}

type PsArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

/** A machine as `ps` lists it; what a machine that does not answer or has failed cannot tell is absent. */
type Listing = Partial<MachineStatus> & Pick<MachineStatus, 'name' | 'state'> & { exitCode?: number; message?: string };

export async function handler({ json, quiet }: PsArguments): Promise<void> {
  const { running, failed } = await listMachines();
  const alive = await Promise.all(running.map(statusOf));
  const machines = [...alive.filter((it) => it !== undefined), ...failed.map(failureOf)];
  if (json) process.stdout.write(`${JSON.stringify({ machines }, null, 2)}\n`);
  else if (quiet) process.stdout.write(running.map((name) => `${name}\n`).join(''));
  else process.stdout.write(table(machines));
}

async function statusOf(name: string): Promise<Listing | undefined> {
  try {
    return await ask(name, 'status', {}, { timeout: PATIENCE_MS });
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ERR_MACHINE_ENDED') return undefined;
    const pid = holderOf(name)?.pid;
    const state = code === 'ERR_MACHINE_NOT_FOUND' ? 'starting' : 'unresponsive';
    return { name, state, ...(pid === undefined ? {} : { pid }) };
  }
}

function failureOf(name: string): Listing {
  try {
    const { exitCode, message } = JSON.parse(readFileSync(pathsOf(name).failure, 'utf8'));
    return { name, state: 'failed', exitCode, message };
  } catch {
    return { name, state: 'failed' };
  }
}

function table(machines: readonly Listing[]): string {
  const rows = machines.map(({ name, pid, state, exitCode, uptime, memory, cpus, kernel, snapshot, message }) => [
    name,
    String(pid ?? '-'),
    exitCode === undefined ? state : `${state} (${exitCode})`,
    uptime === undefined ? '-' : formatDuration(uptime),
    memory === undefined ? '-' : formatSize(memory),
    String(cpus ?? '-'),
    snapshot ? `snapshot ${snapshot}` : (kernel ?? message ?? '-'),
  ]);
  const all = [['NAME', 'PID', 'STATE', 'UPTIME', 'MEMORY', 'CPUS', 'FROM'], ...rows];
  const widths = all[0]?.map((_, column) => Math.max(...all.map((row) => row[column]?.length ?? 0))) ?? [];
  const line = (row: string[]) => row.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join('  ');
  return all.map((row) => `${line(row).trimEnd()}\n`).join('');
}

/** `42s`, `3m 5s`, `2h 7m`, `3d 4h`. */
export function formatDuration(milliseconds: number): string {
  const seconds = Math.floor(milliseconds / 1000);
  const [minutes, hours, days] = [Math.floor(seconds / 60), Math.floor(seconds / 3600), Math.floor(seconds / 86400)];
  if (minutes === 0) return `${seconds}s`;
  if (hours === 0) return `${minutes}m ${seconds % 60}s`;
  if (days === 0) return `${hours}h ${minutes % 60}m`;
  return `${days}d ${hours % 24}h`;
}
