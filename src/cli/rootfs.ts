import type { Argv } from 'yargs';
import { rootfsPath } from '../machine/default-guest.js';

export function builder(yargs: Argv) {
  return yargs
    .positional('action', {
      choices: ['build', 'path'] as const,
      describe: 'both build it when it must be, and print its path',
    })
    .option('size', { type: 'string', requiresArg: true, default: '256M', describe: 'of the file system' })
    .example(
      '$0 run --drive file="$($0 rootfs path)",overlay=my.overlay --append "root=/dev/vda rw"',
      'boot from it; what the guest writes is kept in my.overlay',
    )
    .example('cp --sparse=always "$($0 rootfs path)" disk.img; chmod u+w disk.img', 'a disk of your own');
}

type RootfsArguments = Awaited<ReturnType<typeof builder>['argv']>;

export async function handler({ size }: RootfsArguments): Promise<void> {
  process.stdout.write(`${await rootfsPath(size)}\n`);
}
