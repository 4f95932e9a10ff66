import type { Argv } from 'yargs';
import { initramfsPath } from '../machine/default-guest.js';

export function builder(yargs: Argv) {
  return yargs
    .positional('action', {
      choices: ['build', 'path'] as const,
      describe: 'both build it when it must be, and print its path',
    })
    .example('$0 run --initrd "$($0 initramfs path)"', 'what a script passes to run');
}

export async function handler(): Promise<void> {
  process.stdout.write(`${await initramfsPath()}\n`);
}
