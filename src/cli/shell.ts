import type { ArgumentsCamelCase, Argv } from 'yargs';
import { runCommand } from './guest-command.js';
import { agentOf } from './machines/agent-client.js';
import { abortOnSignals } from './signals.js';

export function builder(yargs: Argv) {
  return yargs
    .positional('name', { type: 'string', demandOption: true, describe: 'of the machine; see tsvisor ps' })
    .option('user', {
      alias: 'u',
      type: 'string',
      requiresArg: true,
      describe: 'NAME or UID, and :GROUP [default: root]',
    })
    .example('$0 shell web', 'as many as you like; exit or Ctrl-D ends each')
    .example('$0 shell web <setup.sh', 'a script for it')
    .epilogue('Its exit code is this one’s. Unlike the console, it needs the agent in the guest and has a size.');
}

type ShellArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler({ name, user }: ShellArguments): Promise<void> {
  using interrupt = abortOnSignals();
  const agent = await agentOf(name, interrupt.signal);
  interrupt[Symbol.dispose]();
  process.exitCode = await runCommand((...call) => agent.spawn(...call), 'exec "$SHELL" -l', {
    stdin: true,
    ...(user !== undefined && { user }),
  });
}
