import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { errorToData, UsageError } from '../errors.js';
import * as doctor from './doctor.js';
import { ERROR_EXIT } from './exit-codes.js';
import * as initramfs from './initramfs.js';
import * as kernel from './kernel.js';
import * as rootfs from './rootfs.js';
import * as run from './run.js';

/** Options that may be given several times; of any other the last one counts. */
const REPEATABLE = ['_', '--', 'drive', 'net', 'port'];

function lastOfEach(args: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(args)) {
    if (Array.isArray(value) && !REPEATABLE.includes(name)) args[name] = value.at(-1);
  }
}

/** The command line: parses, runs one command, and turns every failure into one line and an exit code. */
export async function main(argv: readonly string[]): Promise<void> {
  process.stdout.on('error', () => {}); // a closed stdout is the running command's to notice, not a crash
  process.stderr.on('error', () => {});
  const parser = yargs(hideBin([...argv]))
    .scriptName('tsvisor')
    .parserConfiguration({ 'boolean-negation': false, 'greedy-arrays': false })
    .middleware(lastOfEach, true)
    .usage('$0 <command>\n\nVirtual machines on KVM, with their devices in TypeScript.')
    .command(run.command, run.describe, run.builder, run.handler)
    .command(doctor.command, doctor.describe, doctor.builder, doctor.handler)
    .command(kernel.command, kernel.describe, kernel.builder, kernel.handler)
    .command(initramfs.command, initramfs.describe, initramfs.builder, initramfs.handler)
    .command(rootfs.command, rootfs.describe, rootfs.builder, rootfs.handler)
    .demandCommand(1, 'a command is needed')
    .recommendCommands()
    .strict()
    .wrap(Math.min(100, process.stdout.columns ?? 100))
    .help()
    .alias('help', 'h')
    .version()
    .fail((message, error) => {
      // What yargs finds wrong has a message, in several lines; what a command throws comes as it is.
      if (!message && error) throw error;
      throw new UsageError(`${message.replace(/\s+/g, ' ').trim()}; see tsvisor --help`);
    });
  try {
    await parser.parseAsync();
  } catch (error) {
    const { code, message, stack } = errorToData(error);
    process.stderr.write(code === 'ERR_INTERNAL' ? `tsvisor: ${stack ?? message}\n` : `tsvisor: ${message}\n`);
    process.exitCode = ERROR_EXIT[code];
  }
  // Nothing here may keep a finished command alive.
  process.exit();
}
