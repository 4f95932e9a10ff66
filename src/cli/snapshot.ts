import { resolve } from 'node:path';
import type { ArgumentsCamelCase, Argv } from 'yargs';
import { ask } from './machines/control-client.js';
import { Progress } from './progress.js';
import { abortOnSignals } from './signals.js';
import { formatSize } from './size.js';
import { untilGone } from './stop.js';

export function builder(yargs: Argv) {
  return yargs
    .usage(
      '$0 snapshot <name> <folder> [options]\n\nSave a machine as it is now: memory, vCPU, devices and drives. ' +
        'The guest stands still for a moment and goes on. tsvisor restore and clone make machines from the folder.',
    )
    .positional('name', { type: 'string', demandOption: true, describe: 'of the machine; see tsvisor ps' })
    .positional('folder', { type: 'string', demandOption: true, describe: 'to be made; complete, or not at all' })
    .option('differential', {
      type: 'boolean',
      default: false,
      describe: 'only the memory written since the snapshot before, which must stay where it is; see --track',
    })
    .option('track', {
      type: 'boolean',
      default: false,
      describe: 'note what the guest writes from now on, for a --differential one later',
    })
    .option('disks', {
      choices: ['copy', 'reference'] as const,
      default: 'copy' as const,
      describe: 'drives that the guest writes: a copy in the snapshot, or only their paths (best with --stop)',
    })
    .option('stop', { type: 'boolean', default: false, describe: 'the machine ends with the snapshot' })
    .option('json', { type: 'boolean', default: false, describe: 'one JSON object on stdout' })
    .example('$0 snapshot web ready', 'save it as the folder ready; web goes on')
    .example('$0 restore ready -- uname -a', 'a machine for one command, in a moment')
    .example('$0 snapshot web asleep --stop', 'put a machine to sleep; tsvisor restore asleep wakes it up')
    .example('$0 snapshot web one --track', 'and then, with much less to write:')
    .example('$0 snapshot web two --differential', 'what was written since; two needs one beside it')
    .epilogue(
      'What a snapshot holds and what not: docs/snapshots.md. Ctrl-C gives it up: nothing is left of it, and the machine ' +
        'goes on.\nExit codes: 64 usage, 68 no such machine, 70 it ended meanwhile, 79 it cannot be saved.',
    );
}

type SnapshotArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler(args: SnapshotArguments): Promise<void> {
  const { name, folder, differential, disks, stop, json } = args;
  using interrupt = abortOnSignals();
  using progress = new Progress(`saving ${name}`);
  const params = { folder: resolve(folder), differential, track: args.track || differential, disks, stop };
  const info = await ask(name, 'snapshot', params, { timeout: Infinity, signal: interrupt.signal, withdraw: true });
  if (stop) await untilGone(name);
  progress[Symbol.dispose]();
  if (json) process.stdout.write(`${JSON.stringify(info, null, 2)}\n`);
  else {
    const pause = `the guest stood still for ${Math.ceil(info.pauseMs)} ms`;
    process.stdout.write(`${info.path}: ${formatSize(info.memoryBytes)} of memory; ${pause}\n`);
  }
}
