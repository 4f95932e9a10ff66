import type { ArgumentsCamelCase, Argv } from 'yargs';
import { wholeAddress } from './address.js';
import { readKey } from './key-file.js';
import { ask } from './machines/control-client.js';
import { checkName } from './machines/machine-folder.js';
import { migrationProgress } from './migration-progress.js';
import { parseNumber } from './number.js';
import { Progress } from './progress.js';
import { abortOnSignals } from './signals.js';
import { formatSize } from './size.js';
import { untilGone } from './stop.js';

export function builder(yargs: Argv) {
  return yargs
    .usage(
      '$0 migrate <name> <address> [options]\n\nMove a machine, while it runs, to another process, where tsvisor receive ' +
        'waits for it.',
    )
    .positional('name', { type: 'string', demandOption: true, describe: 'of the machine; see tsvisor ps' })
    .positional('address', { type: 'string', demandOption: true, describe: 'tcp:HOST:PORT or unix:PATH' })
    .option('key', {
      type: 'string',
      requiresArg: true,
      demandOption: true,
      describe: 'file with the secret that both sides have, 16 bytes or more; nobody else may read it',
    })
    .option('max-downtime', {
      type: 'string',
      default: '300',
      requiresArg: true,
      describe: 'milliseconds that the guest should stand still at most; no promise',
    })
    .option('json', { type: 'boolean', default: false, describe: 'one JSON object on stdout' })
    .example('(umask 077; head -c 32 /dev/urandom >key)', 'a key; copy it to the other host')
    .example('$0 receive tcp:0.0.0.0:7000 --key key --name web -d', 'on the other host')
    .example('$0 migrate web tcp:other:7000 --key key', 'on this one: web runs there when this returns')
    .epilogue(
      'Memory is copied while the guest runs, which stands still for the last of it. Whatever goes wrong, one machine goes ' +
        'on: here, unless the other side has taken it. Its process here ends with exit code 0. Connections of the guest ' +
        'through a user network and by vsock are reset. Ctrl-C gives up, and the machine goes on here.\n' +
        'Exit codes: 64 usage, 68 no such machine, 70 it ended meanwhile, 85 it could not be moved.',
    );
}

type MigrateArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler({ name, address, key, maxDowntime, json }: MigrateArguments): Promise<void> {
  checkName(name);
  const params = {
    address: wholeAddress(address),
    key: readKey(key).toString('base64'),
    maxDowntime: parseNumber('max-downtime', maxDowntime, 'a number of milliseconds from 1', 1, 2 ** 31 - 1),
  };
  using interrupt = abortOnSignals();
  using progress = new Progress(`moving ${name}`);
  const result = await ask(name, 'migrate', params, {
    timeout: Infinity,
    signal: interrupt.signal,
    withdraw: true,
    onProgress: (at) => progress.update(`moving ${name}: ${migrationProgress(at)}`),
  });
  await untilGone(name);
  progress[Symbol.dispose]();
  const { downtimeMs, totalMs, rounds, bytes } = result;
  if (json) process.stdout.write(`${JSON.stringify({ name, ...result }, null, 2)}\n`);
  else {
    const pause = `the guest stood still for ${Math.ceil(downtimeMs)} ms`;
    const effort = `${formatSize(bytes)} in ${rounds} rounds, ${(totalMs / 1e3).toFixed(1)} s`;
    process.stdout.write(`${name} runs at ${address}: ${pause}; ${effort}\n`);
  }
}
