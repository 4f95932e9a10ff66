import { readFileSync } from 'node:fs';
import { Machine } from '#dist/index.js';
import { withBootedGuest } from './booted.js';
import { compileReference } from './compile.js';
import { outputOf } from './contestants.js';
import { interleave } from './interleave.js';
import type { Bench, BenchOptions, Measurement } from './result.js';

const ROUNDS = 5;
/** Long ones have all that interrupts a program in them; of short ones most are between two timer ticks. In ms. */
const LONG = { segment: 250, segments: 4 };
const SHORT = { segment: 1, segments: 500 };
/** Milliseconds in which interruptions are looked for. */
const WATCHED = 1000;
const PROGRAM = '/tmp/cpu';

/** Runs reference/cpu.c with arguments. @returns what it printed. */
type Run = (args: readonly string[]) => Promise<string>;

/** Programs in a guest beside the same programs on the host. */
export const cpu: Bench = {
  name: 'cpu',
  describe: 'a program that computes or reads memory, in a Linux guest’s user mode and on the host',
  run: (options) => withBootedGuest(options, (snapshot) => measure(snapshot, options)),
};

async function measure(snapshot: string, { rounds = ROUNDS }: BenchOptions): Promise<Measurement[]> {
  const ticksPerSecond = Number(await outputOf(compileReference('tsc.c'), []));
  const program = compileReference('cpu.c', ['-static']);
  await using machine = await Machine.restore(snapshot);
  await machine.resume();
  await machine.fs.writeFile(PROGRAM, readFileSync(program), { mode: 0o755 });
  const inGuest: Run = async (args) => {
    const { code, stdout, stderr } = await machine.exec(PROGRAM, { args });
    if (code !== 0) throw new Error(`cpu failed in the guest: ${stderr.trim() || `code ${code}`}`);
    return stdout;
  };
  const onHost: Run = (args) => outputOf(program, args);

  const compare = async (name: string, unit: string, better: Measurement['better'], measureBy: By) => {
    const contestants = { host: () => measureBy(onHost), tsvisor: () => measureBy(inGuest) };
    const { tsvisor = [], ...peers } = await interleave(rounds, contestants);
    return { name, unit, better, tsvisor, peers };
  };
  const measurements: Measurement[] = [];
  for (const loop of ['compute', 'memory']) {
    const speed = (times: typeof LONG) => (run: Run) => speeds(run, loop, times, ticksPerSecond);
    measurements.push(await compare(loop, 'M iterations/s', 'higher', speed(LONG)));
    measurements.push(await compare(`${loop}, between interruptions`, 'M iterations/s', 'higher', speed(SHORT)));
  }
  const interruptions = (statistic: (gaps: readonly number[], of: number) => number[]) => async (run: Run) => {
    const { gaps, of } = await gapsOf(run, ticksPerSecond);
    return statistic(gaps, of);
  };
  const sum = (gaps: readonly number[]) => gaps.reduce((total, gap) => total + gap, 0);
  return [
    ...measurements,
    await compare(
      'time that a program is interrupted',
      '%',
      'lower',
      interruptions((gaps, of) => [(sum(gaps) / of) * 100]),
    ),
    await compare(
      'interruptions',
      '1/s',
      'lower',
      interruptions((gaps, of) => [(gaps.length / of) * 1e6]),
    ),
    await compare(
      'each interruption',
      'us',
      'lower',
      interruptions((gaps) => [...gaps]),
    ),
  ];
}

/** Does something in a guest or on the host. @returns its samples. */
type By = (run: Run) => Promise<number[]>;

/** Million iterations a second of each segment. */
async function speeds(run: Run, loop: string, times: typeof LONG, ticksPerSecond: number): Promise<number[]> {
  const ticks = Math.round((times.segment * ticksPerSecond) / 1e3);
  const output = await run([loop, `${ticks}`, `${times.segments}`]);
  const lines = output.trim().split('\n');
  if (lines.length !== times.segments) throw new Error(`cpu printed ${lines.length} segments`);
  return lines.map((line) => {
    const [iterations = 0, span = 1] = line.split(' ').map(Number);
    return ((iterations / span) * ticksPerSecond) / 1e6;
  });
}

/** Interruptions and the time that they were looked for, in microseconds. */
async function gapsOf(run: Run, ticksPerSecond: number): Promise<{ gaps: number[]; of: number }> {
  const output = await run(['gaps', `${Math.round((WATCHED * ticksPerSecond) / 1e3)}`, '1']);
  const microseconds = (ticks: string) => (Number(ticks) / ticksPerSecond) * 1e6;
  const lines = output.trim().split('\n');
  const of = /^of (\d+)$/.exec(lines.pop() ?? '')?.[1];
  if (of === undefined) throw new Error(`cpu printed ${output.trim()}`);
  return { gaps: lines.map(microseconds), of: microseconds(of) };
}
