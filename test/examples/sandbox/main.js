// @ts-check
/**
 * Runs shell scripts that nobody trusts, each in a machine of its own: no network, 64 MiB, twenty seconds, and of its files
 * only what it leaves in /out. One machine boots, and all of them go on from its snapshot.
 * `node main.js RESULTS SCRIPT...`; one line of JSON for each.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { Machine, TsvisorError } from 'tsvisor';

const [results, ...scripts] = process.argv.slice(2);
if (results === undefined || scripts.length === 0) {
  process.stderr.write('usage: node main.js RESULTS SCRIPT...\n');
  process.exit(64);
}

/** @param {string} into */
async function boot(into) {
  const machine = await Machine.create({ memory: 64 * 2 ** 20, onReset: 'end' });
  try {
    await machine.start();
    await machine.exec('mkdir -m 777 /in /out');
    await machine.snapshot(into, { stop: true });
  } finally {
    await machine.close();
  }
}

/** @param {string} snapshot @param {string} script @param {string} into */
async function sandbox(snapshot, script, into) {
  const machine = await Machine.restore(snapshot);
  try {
    await machine.resume();
    await machine.fs.copyIn(script, '/in/script');
    const result = await machine.exec('sh', {
      args: ['/in/script'],
      cwd: '/out',
      user: '65534', // nobody
      timeout: 20_000,
      maxBuffer: 64 * 1024,
    });
    const { files, bytes } = await machine.fs.copyOut('/out', into, { maxBytes: 2 ** 20, maxEntries: 100 });
    return { ...result, files, bytes };
  } catch (error) {
    if (!(error instanceof TsvisorError)) throw error;
    return { error: error.code };
  } finally {
    await machine.close();
  }
}

const folder = await mkdtemp(join(tmpdir(), 'sandbox-'));
const snapshot = join(folder, 'ready');

/** As many at a time as there are processors. */
async function worker() {
  for (let script = scripts.shift(); script !== undefined; script = scripts.shift()) {
    const result = await sandbox(snapshot, script, join(results ?? '', basename(script)));
    process.stdout.write(`${JSON.stringify({ script: basename(script), ...result })}\n`);
  }
}

try {
  await boot(snapshot);
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
} finally {
  await rm(folder, { recursive: true });
}
