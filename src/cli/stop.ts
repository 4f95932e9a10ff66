import { setTimeout as delay } from 'node:timers/promises';
import type { ArgumentsCamelCase, Argv } from 'yargs';
import { TsvisorError } from '../errors.js';
import { ControlClient, notFound } from './machines/control-client.js';
import { ANSWER_MS, type Ended } from './machines/control-protocol.js';
import { checkName, holderOf, isRunning, listMachines, removeStale } from './machines/machine-folder.js';
import { parseSeconds } from './number.js';
import { Progress } from './progress.js';

/** How long a process whose machine has ended may take to be gone, in milliseconds. */
const GONE_MS = 10_000;
const POLL_MS = 20;

export function builder(yargs: Argv) {
  return yargs
    .positional('name', { type: 'string', demandOption: true, describe: 'of the machine; see tsvisor ps' })
    .option('timeout', {
      alias: 't',
      type: 'string',
      default: '10',
      requiresArg: true,
      describe: 'seconds for the guest to power off; then its power is cut',
    })
    .option('force', {
      alias: 'f',
      type: 'boolean',
      default: false,
      describe: 'cut the power at once; kill the process if it does not answer',
    })
    .option('json', { type: 'boolean', default: false, describe: 'one JSON object on stdout' })
    .example('$0 stop web', 'the agent in the guest powers it off; a guest without one has its power cut')
    .example('$0 stop web --timeout 60', 'more time for a guest with much to do')
    .epilogue('Returns when the machine is gone. Also forgets a machine that failed.');
}

type StopArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler({ name, timeout, force, json }: StopArguments): Promise<void> {
  const milliseconds = parseSeconds('timeout', timeout);
  const ended = await stop(checkName(name), milliseconds, force);
  if (json) process.stdout.write(`${JSON.stringify({ name, ...ended }, null, 2)}\n`);
  else if (ended.agent && ended.reason === 'stopped' && !force) {
    process.stderr.write(`tsvisor: ${name} did not power off in ${timeout} s: its power was cut\n`);
  }
}

async function stop(name: string, timeout: number, force: boolean): Promise<Partial<Ended> & { agent?: boolean }> {
  if (!isRunning(name)) {
    const { failed } = await listMachines();
    if (!failed.includes(name)) throw notFound(name);
    removeStale(name);
    return {};
  }
  const holder = holderOf(name);
  try {
    using client = await ControlClient.connect(name);
    const { agent } = await client.request('status', {});
    using _progress = new Progress(`waiting for ${name} to ${agent && !force ? 'power off' : 'end'}`);
    const ended = await client.request('stop', { timeout, force }, { timeout: ANSWER_MS + (force ? 0 : timeout) });
    await untilGone(name);
    return { ...ended, agent };
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ERR_MACHINE_ENDED' && code !== 'ERR_TIMEOUT' && code !== 'ERR_MACHINE_NOT_FOUND') throw error;
    if (isRunning(name) && code !== 'ERR_MACHINE_ENDED') {
      if (!force && code === 'ERR_TIMEOUT') throw error;
      // The lock is held, so that its holder is alive, and the process of that number is that one.
      if (holder && holderOf(name)?.pid === holder.pid) process.kill(holder.pid, force ? 'SIGKILL' : 'SIGTERM');
    }
    await untilGone(name);
    removeStale(name);
    return {};
  }
}

/** Resolves when a machine's process is gone. @throws TsvisorError ERR_TIMEOUT */
export async function untilGone(name: string): Promise<void> {
  for (const end = performance.now() + GONE_MS; isRunning(name); await delay(POLL_MS)) {
    if (performance.now() < end) continue;
    throw new TsvisorError('ERR_TIMEOUT', `machine ${name} does not end; tsvisor stop --force ${name} kills it`);
  }
}
