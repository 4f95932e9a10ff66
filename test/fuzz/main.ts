import { parseArgs } from 'node:util';
import { FuzzFailure, fuzz, replay } from './run.js';
import { fuzzSnapshots, replaySnapshot, SNAPSHOT } from './snapshot/fuzz.js';
import { targets } from './targets/index.js';

const names = targets.map(({ name }) => name);
const USAGE = `usage: npm run fuzz -- TARGET [--seed N] [--cases N] [--case K]
TARGET is one of ${names.join(', ')}, all of them (all), or ${SNAPSHOT}. --case replays that case of a seed alone.`;

function integer(text: string | undefined, otherwise: number): number {
  const value = text === undefined ? otherwise : Number(text);
  if (!Number.isSafeInteger(value) || value < 0) fail(`${text} is not a whole number`);
  return value;
}

function fail(message: string): never {
  process.stderr.write(`${message}\n${USAGE}\n`);
  process.exit(2);
}

function run(name: string, seed: number, cases: number): void {
  const target = targets.find((one) => one.name === name);
  if (!target) fail(`there is no target ${name}`);
  process.stdout.write(`${name}: seed ${seed}, ${cases} cases\n`);
  const start = performance.now();
  const rate = (done: number) => Math.round(done / ((performance.now() - start) / 1e3));
  let shown = start;
  const onProgress = (done: number) => {
    if (!process.stdout.isTTY || performance.now() - shown < 500) return;
    shown = performance.now();
    process.stdout.write(`\r${name}: ${done} cases, ${rate(done)} cases/s `);
  };
  const operations = fuzz(target, { seed, cases, onProgress });
  const seconds = ((performance.now() - start) / 1e3).toFixed(1);
  const done = `${cases} cases of ${operations} operations in ${seconds} s, ${rate(cases)} cases/s, no failure`;
  process.stdout.write(`${process.stdout.isTTY ? '\r' : ''}${name}: ${done}\n`);
}

async function runSnapshots(seed: number, cases: number, only: string | undefined): Promise<void> {
  if (only !== undefined) {
    const steps = await replaySnapshot(seed, integer(only, 0));
    process.stdout.write(`${steps.join('\n')}\nno failure\n`);
    return;
  }
  process.stdout.write(`${SNAPSHOT}: seed ${seed}, ${cases} cases\n`);
  const onProgress = (done: number) => {
    if (done % 500 === 0) process.stdout.write(`${SNAPSHOT}: ${done} cases\n`);
  };
  const outcomes = await fuzzSnapshots({ seed, cases, onProgress });
  process.stdout.write(`${SNAPSHOT}: ${cases} cases, no failure: ${JSON.stringify(outcomes)}\n`);
}

try {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { seed: { type: 'string' }, cases: { type: 'string' }, case: { type: 'string' } },
  });
  const [name, ...more] = positionals;
  if (name === undefined || more.length > 0) fail('one target, please');
  const seed = integer(values.seed ?? process.env.TSVISOR_SEED, Date.now() % 2 ** 32);
  if (name === SNAPSHOT) await runSnapshots(seed, integer(values.cases, 10_000), values.case);
  else if (values.case === undefined) {
    for (const one of name === 'all' ? names : [name]) run(one, seed, integer(values.cases, 1_000_000));
  } else {
    const target = targets.find((one) => one.name === name);
    if (!target) fail(`there is no target ${name}`);
    const steps = replay(target, seed, integer(values.case, 0));
    process.stdout.write(`${steps.map((step, i) => `${i}. ${step}`).join('\n')}\nno failure\n`);
  }
} catch (error) {
  const shown = error instanceof FuzzFailure ? error.message : error instanceof Error ? error.stack : String(error);
  process.stderr.write(`\n${shown}\n`);
  process.exit(1);
}
