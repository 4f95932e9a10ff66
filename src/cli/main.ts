import type { Argv } from 'yargs';
import { errorToData, UsageError } from '../errors.js';
import { keepWarm, type MachineThread, offerThread } from '../machine/warm-threads.js';
import { packageVersion } from '../package-version.js';
import { Chosen, COMMANDS, nameOf } from './commands.js';
import { CLOSED_STDOUT_EXIT, ERROR_EXIT, exitCodeOf } from './exit-codes.js';
import { SignalError } from './signals.js';
import { yargs } from './yargs.js';

/** Options that may be given several times; of any other the last one counts. */
const REPEATABLE = ['_', '--', 'command', 'drive', 'env', 'e', 'net', 'port'];

/** Commands that take one for the guest. */
const TAKE_COMMAND: readonly (string | undefined)[] = ['exec', 'run', 'restore'];

function lastOfEach(args: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(args)) {
    if (Array.isArray(value) && !REPEATABLE.includes(name)) args[name] = value.at(-1);
  }
}

/** The parser of one command line. Only the command that it names is loaded. */
async function parserOf(args: readonly string[]): Promise<Argv> {
  const wanted = args.find((word) => !word.startsWith('-'));
  let parser = yargs(args)
    .scriptName('tsvisor')
    .locale('en') // as all our own text
    .parserConfiguration({ 'boolean-negation': false, 'greedy-arrays': false, 'populate--': true })
    .middleware(lastOfEach, true)
    .usage('$0 <command>\n\nVirtual machines on KVM, with their devices in TypeScript.');
  for (const command of COMMANDS) {
    parser =
      nameOf(command) === wanted
        ? await command.register(parser)
        : parser.command(command.usage, command.describe, {}, () => {});
  }
  return parser
    .demandCommand(1, 'a command is needed')
    .recommendCommands()
    .strict()
    .wrap(Math.min(100, process.stdout.columns ?? 100))
    .help()
    .alias('help', 'h')
    .version(packageVersion()) // yargs takes that of the package around node_modules
    .fail((message, error) => {
      // What yargs finds wrong has a message, in several lines; what a command throws comes as it is.
      if (!message && error) throw error;
      const forGuest = TAKE_COMMAND.includes(wanted) ? '; a command for the guest goes after --' : '';
      const text = message.replace(/\s+/g, ' ').trim();
      // yargs only says what else it might have been.
      const problem = text.startsWith('Did you mean') ? `there is no command '${wanted}'. ${text}` : text;
      throw new UsageError(`${problem}${forGuest}; see tsvisor --help`);
    });
}

/** @returns the command that is to run; nothing where yargs has answered itself. @throws UsageError */
async function choose(args: readonly string[]): Promise<Chosen | undefined> {
  const parser = await parserOf(args);
  try {
    parser.parseSync();
  } catch (error) {
    if (error instanceof Chosen) return error;
    throw error;
  }
  return undefined;
}

/**
 * The command line: parses, runs one command, and turns every failure into one line and an exit code.
 * @param thread for the machine of the command
 */
export async function main(argv: readonly string[], thread?: MachineThread): Promise<void> {
  keepWarm(0); // there is one machine at most
  if (thread) offerThread(thread);
  let outputError: NodeJS.ErrnoException | undefined;
  process.stdout.on('error', (error) => {
    outputError ??= error; // the running command may notice, too
  });
  process.stderr.on('error', () => {});
  try {
    const args = argv.slice(2);
    if (args[0] === '__complete') await (await import('./complete.js')).complete(args.slice(1));
    else await (await choose(args))?.run();
  } catch (error) {
    if (error instanceof SignalError) process.exit(error.exitCode);
    const { code, message, stack } = errorToData(error);
    process.stderr.write(code === 'ERR_INTERNAL' ? `tsvisor: ${stack ?? message}\n` : `tsvisor: ${message}\n`);
    process.exitCode = exitCodeOf(error);
  }
  await new Promise((resolve) => process.stdout.write('', resolve)); // errors of what was written are known then
  const done = !process.exitCode || process.exitCode === CLOSED_STDOUT_EXIT;
  if (outputError && done) {
    const closed = outputError.code === 'EPIPE';
    if (!closed) process.stderr.write(`tsvisor: cannot write to stdout: ${outputError.message}\n`);
    process.exitCode = closed ? CLOSED_STDOUT_EXIT : ERROR_EXIT.ERR_OUTPUT;
  }
  // Nothing here may keep a finished command alive.
  process.exit();
}
