import type { ArgumentsCamelCase, Argv } from 'yargs';
import { UsageError } from '../errors.js';
import { runCommand } from './guest-command.js';
import { agentOf } from './machines/agent-client.js';
import { parseSeconds } from './number.js';
import { repeatable } from './repeatable.js';
import { abortOnSignals } from './signals.js';

export function builder(yargs: Argv) {
  return yargs
    .positional('name', { type: 'string', demandOption: true, describe: 'of the machine; see tsvisor ps' })
    .positional('command', { type: 'string', array: true, describe: 'program and arguments; best after --' })
    .option('interactive', {
      alias: 'i',
      type: 'boolean',
      describe: 'the command reads this stdin [default: with a terminal]',
    })
    .option('tty', {
      alias: 't',
      type: 'boolean',
      describe: 'the command has a terminal; --tty=false: none [default: if stdin and stdout are one]',
    })
    .option('user', {
      alias: 'u',
      type: 'string',
      requiresArg: true,
      describe: 'NAME or UID, and :GROUP [default: root]',
    })
    .option('workdir', { alias: 'w', type: 'string', requiresArg: true, describe: 'folder [default: the user’s home]' })
    .option('env', {
      alias: 'e',
      ...repeatable('NAME=VALUE for its environment; NAME alone: as it is here; repeatable'),
    })
    .option('timeout', { type: 'string', requiresArg: true, describe: 'end the command after this many seconds' })
    .example('$0 exec web -- uname -a', 'run a program; its exit code is this one’s')
    .example('$0 exec web -- sh -c "ls /tmp | wc -l"', 'a shell’s command line')
    .example('$0 exec -i web -- tar -xC /srv <site.tar', 'it reads this stdin')
    .example('$0 exec -e DEBUG=1 -w /srv -u nobody web -- ./serve', 'environment, folder and user')
    .epilogue(
      'SIGINT and SIGTERM go to the command. Exit codes: the command’s own, 128 + the signal that ended it, 124 timeout, ' +
        '126 the program cannot be run, 127 there is none, 68 no such machine, 70 it ended meanwhile, 76 no agent answers.',
    );
}

type ExecArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler(args: ExecArguments): Promise<void> {
  const [command, ...rest] = commandOf(args, args.command);
  if (command === undefined) throw new UsageError(`exec: a command is needed: tsvisor exec ${args.name} -- COMMAND`);
  const timeout = args.timeout === undefined ? undefined : parseSeconds('timeout', args.timeout);
  const env = parseEnvironment(args.env);
  using interrupt = abortOnSignals();
  const agent = await agentOf(args.name, interrupt.signal);
  interrupt[Symbol.dispose]();
  process.exitCode = await runCommand((...call) => agent.spawn(...call), command, {
    args: rest,
    env,
    ...(args.workdir !== undefined && { cwd: args.workdir }),
    ...(args.user !== undefined && { user: args.user }),
    ...(timeout !== undefined && { timeout }),
    terminal: args.tty,
    stdin: args.interactive,
  });
}

/** The words after `--`, which are not touched, behind those before it. */
export function commandOf(args: object, positional: readonly string[] = []): string[] {
  const after = '--' in args && Array.isArray(args['--']) ? args['--'].map(String) : [];
  return [...positional, ...after];
}

/** @throws UsageError */
export function parseEnvironment(settings: readonly string[]): Record<string, string> {
  const pairs = settings.map((setting) => {
    const equals = setting.indexOf('=');
    const name = equals < 0 ? setting : setting.slice(0, equals);
    if (name === '') throw new UsageError(`--env ${setting}: a name is needed; write --env NAME=VALUE`);
    return [name, equals < 0 ? process.env[name] : setting.slice(equals + 1)] as const;
  });
  return Object.fromEntries(pairs.filter((pair): pair is [string, string] => pair[1] !== undefined));
}
