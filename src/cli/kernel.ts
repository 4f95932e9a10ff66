import type { Argv } from 'yargs';
import { DEFAULT_FLAVOUR, kernelPath, listKernels } from '../machine/default-guest.js';
import { formatSize } from './size.js';

export function builder(yargs: Argv) {
  return yargs
    .positional('action', { choices: ['build', 'list', 'path'] as const, demandOption: true, describe: 'what to do' })
    .positional('flavour', {
      type: 'string',
      describe: `configuration in guest-images/kernel [default: ${DEFAULT_FLAVOUR}]`,
    })
    .option('source', {
      type: 'string',
      requiresArg: true,
      describe: 'kernel source tarball [default: Debian’s linux-source-6.1]',
    })
    .option('json', { type: 'boolean', default: false, describe: 'list: one JSON object on stdout' })
    .example('$0 kernel build', `build the default flavour (minutes, once), then print its path`)
    .example('$0 kernel list', 'flavours, and which are built')
    .example('$0 run --kernel "$($0 kernel path)"', 'what a script passes to run; builds it when it must');
}

type KernelArguments = Awaited<ReturnType<typeof builder>['argv']>;

export async function handler(args: KernelArguments): Promise<void> {
  if (args.action === 'list') {
    const kernels = listKernels();
    const lines = kernels.flatMap(({ flavour, built }) =>
      built.length === 0
        ? [`${flavour}\tnot built`]
        : built.map(({ path, bytes, builtAt }) => `${flavour}\t${builtAt}\t${formatSize(bytes)}\t${path}`),
    );
    process.stdout.write(args.json ? `${JSON.stringify({ kernels }, null, 2)}\n` : `${lines.join('\n')}\n`);
    return;
  }
  process.stdout.write(`${await kernelPath(args.flavour, args.source)}\n`);
}
