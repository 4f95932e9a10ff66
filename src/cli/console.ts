import type { ArgumentsCamelCase, Argv } from 'yargs';
import { CLOSED_STDOUT_EXIT } from './exit-codes.js';
import { ask, ControlClient } from './machines/control-client.js';
import { onSignals } from './signals.js';
import { EscapeFilter, rawTerminal } from './terminal.js';

export function builder(yargs: Argv) {
  return yargs
    .positional('name', { type: 'string', demandOption: true, describe: 'of the machine; see tsvisor ps' })
    .example('$0 console web', 'the guest’s console; press Enter for its prompt')
    .epilogue(
      'Keys: Ctrl-A d leaves the machine running, Ctrl-A x ends it, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h helps.\n' +
        'Any number of terminals may join a console: all see the same, and each may type.',
    );
}

type ConsoleArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler({ name }: ConsoleArguments): Promise<void> {
  using client = await ControlClient.connect(name);
  const console = await client.console();
  const { stdin, stdout, stderr } = process;
  const left = new Promise<number | undefined>((resolve) => {
    onSignals(resolve);
    console.on('close', () => resolve(undefined));
    stdout.on('error', () => resolve(CLOSED_STDOUT_EXIT));
    if (!stdin.isTTY) {
      stdin.on('error', () => {}); // one that cannot be read says nothing
      stdin.pipe(console, { end: false });
      return;
    }
    const end = () => void ask(name, 'stop', { timeout: 0, force: true }).catch(() => {});
    const filter = new EscapeFilter(
      {
        d: { does: 'leave it running', run: () => resolve(0) },
        x: { does: 'end the machine', run: end },
      },
      (text) => stderr.write(text),
    );
    stderr.write(`tsvisor: the console of ${name}; Ctrl-A d leaves it running, Ctrl-A h helps\n`);
    stdin.pipe(filter).pipe(console, { end: false });
  });
  const restore = rawTerminal();
  const resize = () => {
    const { rows, columns } = stdout;
    if (rows > 0 && columns > 0) void ask(name, 'resize', { rows, columns }).catch(() => {}); // it may have ended
  };
  if (stdin.isTTY && stdout.isTTY) {
    stdout.on('resize', resize);
    resize();
  }
  console.pipe(stdout, { end: false });
  const code = await left;
  restore();
  stdin.destroy();
  if (stdin.isTTY) stderr.write(code === undefined ? `\ntsvisor: ${name} has ended\n` : '\n');
  process.exitCode = code ?? 0;
}
