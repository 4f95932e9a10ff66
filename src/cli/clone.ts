import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { basename, join, resolve } from 'node:path';
import type { ArgumentsCamelCase, Argv } from 'yargs';
import { TsvisorError, UsageError } from '../errors.js';
import { readState } from '../snapshot/open.js';
import { type Started, startInFolder } from './detach.js';
import { ask } from './machines/control-client.js';
import { checkName, generateName, isRunning, MachineFolder, NAME } from './machines/machine-folder.js';
import { SharedFolder } from './machines/shared-folder.js';
import { parseNumber, parseSeconds } from './number.js';
import { Progress } from './progress.js';
import { abortOnSignals } from './signals.js';
import { untilGone } from './stop.js';

const MAX_COUNT = 1000;

export function builder(yargs: Argv) {
  return yargs
    .usage(
      '$0 clone <source> [options]\n\nStart machines in the background that all go on from one snapshot, or from where a ' +
        'machine that runs is now, which goes on as well. Each has a name, which is its host name too, and what it writes ' +
        'for itself; they share the memory that none of them has written.',
    )
    .positional('source', {
      type: 'string',
      demandOption: true,
      describe: 'folder of a snapshot, or name of a machine',
    })
    .option('count', { alias: 'n', type: 'string', default: '1', requiresArg: true, describe: 'how many' })
    .option('name', {
      type: 'string',
      requiresArg: true,
      describe: 'their names: NAME-1, NAME-2 … [default: that of the source]',
    })
    .option('timeout', { type: 'string', requiresArg: true, describe: 'end each after this many seconds' })
    .option('json', { type: 'boolean', default: false, describe: 'one JSON object on stdout' })
    .example('$0 clone ready --count 8 --name worker', 'worker-1 to worker-8, from the snapshot ready')
    .example('$0 clone web', 'web-1, from where web is now')
    .example('$0 exec worker-3 -- hostname', 'they are machines like others: worker-3')
    .epilogue(
      'All of them start, or none. A folder of the same name as a machine is written ./NAME. Machines with taps or with ' +
        'ports of this host are cloned one by one: tsvisor restore says how.\n' +
        'Exit codes: 64 usage, 68 no such machine, 79 it is no snapshot or cannot be saved, and those of tsvisor run.',
    );
}

type CloneArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler(args: CloneArguments): Promise<void> {
  const { source, json } = args;
  const count = parseNumber('count', args.count, `a number from 1 to ${MAX_COUNT}`, 1, MAX_COUNT);
  if (!Number.isInteger(count)) throw new UsageError(`--count: ${args.count} is no whole number`);
  if (args.timeout !== undefined) parseSeconds('timeout', args.timeout);
  const more = args.timeout === undefined ? [] : ['--timeout', args.timeout];
  const isMachine = NAME.test(source) && isRunning(source);
  if (!isMachine && !existsSync(source)) {
    const why = `no machine '${source}' runs, and there is no such folder; tsvisor ps lists the machines`;
    throw new TsvisorError('ERR_MACHINE_NOT_FOUND', why);
  }
  const own = basename(resolve(source));
  const prefix = args.name ?? (NAME.test(own) ? own : generateName());
  const names = Array.from({ length: count }, (_, i) => checkName(`${prefix}-${i + 1}`));
  using interrupt = abortOnSignals();
  const { signal } = interrupt;
  using progress = new Progress(`cloning ${source}`);
  using shared = isMachine ? SharedFolder.make() : undefined;
  const snapshot = shared ? join(shared.path, 'snapshot') : resolve(source);
  if (shared) await saveInto(snapshot, source, signal);
  const { config } = await readState(snapshot); // before many processes find that there is something wrong with it
  const hasAgent = (config as { agent?: unknown }).agent === true;
  const onStarted = (started: number) => progress.update(`cloning ${source}: ${started} of ${count}`);
  const environment = { ...process.env, ...shared?.environment };
  const argumentsOf = (name: string) => {
    const hostname = hasAgent ? ['--hostname', name.replaceAll('_', '-')] : [];
    return [process.argv[1] as string, 'restore', snapshot, '--name', name, ...hostname, '--detach', ...more];
  };
  const machines = await startAll(names, argumentsOf, environment, signal, onStarted);
  progress[Symbol.dispose]();
  if (json) process.stdout.write(`${JSON.stringify({ machines }, null, 2)}\n`);
  else process.stdout.write(machines.map(({ name }) => `${name}\n`).join(''));
}

async function saveInto(folder: string, machine: string, signal: AbortSignal): Promise<void> {
  const params = { folder, disks: 'copy', differential: false, track: false, stop: false } as const;
  await ask(machine, 'snapshot', params, { timeout: Infinity, signal, withdraw: true });
}

/** All of them, or none. @throws the first error, when what had started is gone */
async function startAll(
  names: readonly string[],
  argumentsOf: (name: string) => readonly string[],
  environment: NodeJS.ProcessEnv,
  signal: AbortSignal,
  onStarted: (count: number) => void,
): Promise<Started[]> {
  const started: Started[] = [];
  const failure = new AbortController();
  const either = AbortSignal.any([signal, failure.signal]);
  const waiting = names.entries();
  const worker = async () => {
    for (const [index, name] of waiting) {
      either.throwIfAborted();
      started[index] = await startInFolder(await MachineFolder.claim(name), argumentsOf(name), either, environment);
      onStarted(started.filter(Boolean).length);
    }
  };
  // One more than there are processors, since each also waits.
  const workers = Array.from({ length: availableParallelism() + 1 }, () =>
    worker().catch((error: Error) => {
      failure.abort(error);
      throw error;
    }),
  );
  const results = await Promise.allSettled(workers);
  if (results.every(({ status }) => status === 'fulfilled')) return started;
  await Promise.allSettled(started.filter(Boolean).map(({ name }) => endOf(name)));
  signal.throwIfAborted();
  throw failure.signal.reason;
}

async function endOf(name: string): Promise<void> {
  await ask(name, 'stop', { timeout: 0, force: true });
  await untilGone(name);
}
