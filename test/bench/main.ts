import { parseArgs } from 'node:util';
import { boot } from './boot.js';
import { cpu } from './cpu.js';
import { density } from './density.js';
import { exits } from './exits.js';
import { hostFacts, loadWarning } from './host.js';
import { type Bench, type BenchReport, type Measurement, rowOf, tableOf } from './result.js';
import { snapshot } from './snapshot.js';
import { startup } from './startup.js';
import { virtio } from './virtio.js';

/** A bench is one file of this folder and a line here. */
const benches: readonly Bench[] = [exits, startup, boot, virtio, snapshot, density, cpu];

const USAGE = 'npm run bench -- [NAME] [--json] [--rounds N] [--machines N] [--snapshot FOLDER]';
const USAGE_EXIT = 64;

const HELP = `
Without a name all of them are run, one after the other: half an hour, more where KVM interprets the guest's kernel.
  --json             print an object a line for each bench, with medians, quartiles and ratios
  --rounds N         how often each contestant has its turn
  --machines N       how many share the host in the bench 'density'
  --snapshot FOLDER  of a booted guest with an agent, for the benches that boot one otherwise: density and cpu
`;

const note = (text: string) => void process.stderr.write(`bench: ${text}\n`);

class UsageProblem extends Error {}

function parse() {
  try {
    const { values, positionals } = parseArgs({
      options: {
        help: { type: 'boolean', default: false },
        json: { type: 'boolean', default: false },
        rounds: { type: 'string' },
        machines: { type: 'string' },
        snapshot: { type: 'string' },
      },
      allowPositionals: true,
    });
    const count = (name: 'rounds' | 'machines') => {
      const text = values[name];
      const value = text === undefined ? undefined : Number(text);
      if (value === undefined || (Number.isSafeInteger(value) && value > 0)) return value;
      throw new Error(`--${name}: '${text}' is not a number above 0`);
    };
    if (positionals.length > 1) throw new Error('one bench at a time, or all');
    const { help, json, snapshot } = values;
    return { name: positionals[0], help, json, rounds: count('rounds'), machines: count('machines'), snapshot };
  } catch (error) {
    throw new UsageProblem(`${error instanceof Error ? error.message : error}; usage: ${USAGE}`);
  }
}

async function main(): Promise<void> {
  const { name, help, json, ...options } = parse();
  if (help) {
    const width = Math.max(...benches.map((bench) => bench.name.length));
    const list = benches.map((bench) => `  ${bench.name.padEnd(width)}  ${bench.describe}\n`).join('');
    process.stdout.write(`${USAGE}\n\n${list}${HELP}`);
    return;
  }
  const chosen = name === undefined ? benches : benches.filter((bench) => bench.name === name);
  if (chosen.length === 0) {
    throw new UsageProblem(`there is no bench '${name}', only ${benches.map((b) => b.name).join(', ')}`);
  }
  for (const bench of chosen) {
    const host = hostFacts();
    const warning = loadWarning(host);
    if (warning) note(warning);
    try {
      const measurements = await bench.run({ ...options, note });
      report({ bench: bench.name, host, rows: measurements.map(rowOf) }, measurements, json);
    } catch (error) {
      process.exitCode = 1;
      note(`${bench.name}: ${error instanceof Error ? error.message : error}`);
    }
  }
}

function report(report: BenchReport, measurements: readonly Measurement[], json: boolean): void {
  if (json) {
    process.stdout.write(`${JSON.stringify(report)}\n`);
    return;
  }
  const { cpu, cores, kernel, kvm, node, load } = report.host;
  const host = `${cpu}, ${cores} cores, Linux ${kernel}, KVM ${kvm}, Node ${node}, load ${load.join(' ')}`;
  process.stdout.write(`${report.bench}: ${host}\nmedians [quartiles]\n\n${tableOf(measurements)}\n`);
}

try {
  await main();
} catch (error) {
  note(error instanceof Error ? error.message : String(error));
  process.exitCode = error instanceof UsageProblem ? USAGE_EXIT : 1;
}
