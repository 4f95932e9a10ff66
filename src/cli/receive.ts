import type { ArgumentsCamelCase, Argv } from 'yargs';
import { hostOptions } from './host-options.js';
import { restoredOptions } from './restore.js';

export function builder(yargs: Argv) {
  const own = restoredOptions(
    yargs
      .usage(
        '$0 receive <address> [options]\n\nWait for a machine that tsvisor migrate moves here, and let it go on: with this ' +
          'terminal as its console, or in the background (--detach)',
      )
      .positional('address', {
        type: 'string',
        demandOption: true,
        describe: 'where to listen: tcp:HOST:PORT (port 0: a free one) or unix:PATH',
      })
      .option('key', {
        type: 'string',
        requiresArg: true,
        demandOption: true,
        describe: 'file with the secret that both sides have, 16 bytes or more; nobody else may read it',
      }),
  );
  return hostOptions(own)
    .example('(umask 077; head -c 32 /dev/urandom >key)', 'a key; copy it to the other host')
    .example('$0 receive tcp:0.0.0.0:7000 --key key --name web -d', 'returns when it listens')
    .example('$0 migrate web tcp:other:7000 --key key', 'there: web goes on here')
    .epilogue(
      'One machine is awaited; a visitor with another key ends that. Its drives must be reachable here, at the same paths or ' +
        'where --drive says. With --detach it returns when it listens, and prints the name and the address.\n' +
        'Keys and exit codes are those of tsvisor run, and 85: no machine came.',
    );
}

export type ReceiveArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler(args: ReceiveArguments): Promise<void> {
  const { receiveMachine } = await import('./receive-machine.js');
  await receiveMachine(args);
}
