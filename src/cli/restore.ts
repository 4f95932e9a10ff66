import type { ArgumentsCamelCase, Argv } from 'yargs';
import { hostOptions } from './host-options.js';
import { repeatable } from './repeatable.js';

export function builder(yargs: Argv) {
  const own = restoredOptions(
    yargs
      .usage(
        '$0 restore <folder> [options] [-- command..]\n\nLet a machine go on from a snapshot: with this terminal as its ' +
          'console, in the background (--detach), or for one command, whose exit code is this one’s',
      )
      .positional('folder', { type: 'string', demandOption: true, describe: 'of tsvisor snapshot; it is only read' })
      .option('track', {
        type: 'boolean',
        default: false,
        describe: 'note what the guest writes, for a --differential snapshot of it',
      })
      .option('verify', {
        type: 'boolean',
        default: false,
        describe: 'read the memory whole first, and compare it with its checksums',
      })
      .option('prefetch', {
        type: 'boolean',
        default: false,
        describe: 'read the memory in the background, so that the guest does not wait for each page it touches',
      }),
  );
  return hostOptions(own)
    .example('$0 restore ready', 'on this terminal; press Enter for the guest’s prompt')
    .example('$0 restore ready -- make test', 'one command in a machine of its own, which ends with it')
    .example('$0 restore ready --name web -d', 'in the background; then: exec, shell, cp, console, logs, stop web')
    .example('$0 restore ready --net user,hostfwd=tcp:127.0.0.1:8080-:80', 'ports of this host are given again')
    .example('$0 restore ready --drive overlay=mine.overlay', 'keep what the guest writes to its first drive')
    .example('$0 restore ready --name web -d --track', 'the next snapshot may be --differential')
    .epilogue(
      'Any number of machines may go on from one snapshot, which must stay as long as they run. What the guest writes to ' +
        'its drives goes with the machine, unless --drive says where to keep it. Connections to the outside are not part ' +
        'of a snapshot, nor are taps, ports and sockets of this host. More: docs/snapshots.md.\n' +
        'Keys and exit codes are those of tsvisor run, and 79: the folder is no snapshot, damaged, of another version or ' +
        'host, or refers to files that are not there any more.',
    );
}

/** What may be given to a machine that goes on. */
export function restoredOptions<T>(yargs: Argv<T>) {
  return yargs
    .option(
      'drive',
      repeatable(
        'the first drive, the second …: file=FILE, in place of the one it was, and overlay=FILE for what is written, ' +
          'which must not exist; index=N (from 0) for another; repeatable',
        'as they were',
      ),
    )
    .option('net', repeatable('as for run; as many as the machine had, of the same kinds; repeatable', 'user networks'))
    .option('vsock', {
      type: 'string',
      describe: 'cid=N, another address of the guest’s, and socket=PATH, by which to connect',
    })
    .option('hostname', { type: 'string', requiresArg: true, describe: 'the guest’s host name, set by its agent' })
    .option('serial', { type: 'string', describe: 'ttyS0: stdio, none or file:PATH [default: stdio, if it is there]' })
    .option('console', {
      type: 'string',
      describe: 'hvc0: stdio, none, file:PATH or socket:PATH [default: stdio, if it was the console]',
    })
    .option(
      'port',
      repeatable('a byte stream that the machine has: name=NAME,socket=PATH or name=NAME,file=PATH; repeatable'),
    );
}

export type RestoredArguments = Awaited<ReturnType<typeof restoredOptions<object>>['argv']>;
export type RestoreArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler(args: RestoreArguments): Promise<void> {
  const { restoreMachine } = await import('./restore-machine.js');
  await restoreMachine(args);
}
