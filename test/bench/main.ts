import { parseArgs } from 'node:util';
import { exits } from './exits.js';
import { hostFacts, loadWarning } from './host.js';
import { type Bench, type BenchReport, rowOf, tableOf } from './result.js';
import { snapshot } from './snapshot.js';
import { startup } from './startup.js';
import { virtio } from './virtio.js';

/** A bench is one file of this folder and a line here. */
const benches: readonly Bench[] = [exits, startup, snapshot, virtio];

const USAGE = 'npm run bench -- NAME [--json] [--rounds N]';
const USAGE_EXIT = 64;

const note = (text: string) => void process.stderr.write(`bench: ${text}\n`);

class UsageProblem extends Error {}

function parse() {
  try {
    const options = { json: { type: 'boolean', default: false }, rounds: { type: 'string' } } as const;
    const { values, positionals } = parseArgs({ options, allowPositionals: true });
    const rounds = values.rounds === undefined ? undefined : Number(values.rounds);
    if (rounds !== undefined && !(Number.isSafeInteger(rounds) && rounds > 0)) {
      throw new Error(`--rounds: '${values.rounds}' is not a number above 0`);
    }
    if (positionals.length > 1) throw new Error('one bench at a time');
    return { name: positionals[0], json: values.json, rounds };
  } catch (error) {
    throw new UsageProblem(`${error instanceof Error ? error.message : error}; usage: ${USAGE}`);
  }
}

async function main(): Promise<void> {
  const { name, json, rounds } = parse();
  if (name === undefined) {
    const width = Math.max(...benches.map((bench) => bench.name.length));
    const list = benches.map((bench) => `  ${bench.name.padEnd(width)}  ${bench.describe}\n`).join('');
    process.stdout.write(`${USAGE}\n\n${list}`);
    return;
  }
  const bench = benches.find((candidate) => candidate.name === name);
  if (!bench) throw new UsageProblem(`there is no bench '${name}', only ${benches.map((b) => b.name).join(', ')}`);

  const host = hostFacts();
  const warning = loadWarning(host);
  if (warning) note(warning);
  const measurements = await bench.run({ rounds, note });
  if (json) {
    const report: BenchReport = { bench: bench.name, host, rows: measurements.map(rowOf) };
    process.stdout.write(`${JSON.stringify(report)}\n`);
    return;
  }
  const { cpu, cores, kernel, kvm, node } = host;
  process.stdout.write(`${bench.name}: ${cpu}, ${cores} cores, Linux ${kernel}, KVM ${kvm}, Node ${node}\n`);
  process.stdout.write(`medians [quartiles]\n\n${tableOf(measurements)}`);
}

try {
  await main();
} catch (error) {
  note(error instanceof Error ? error.message : String(error));
  process.exitCode = error instanceof UsageProblem ? USAGE_EXIT : 1;
}
