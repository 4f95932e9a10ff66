import { fileURLToPath } from 'node:url';
import { compileUserGuest } from './compile.js';
import { outputOf, QEMU, QEMU_EXIT, qemuArguments } from './contestants.js';
import { type Contestant, interleave } from './interleave.js';
import { type BenchOptions, type Measurement, median, rounded } from './result.js';

/** What guests/virtio.c does, and what that is called. */
export interface Workload {
  readonly name: string;
  readonly unit: string;
  /** What one operation counts in that unit. */
  readonly weight: number;
  readonly bench: string;
  /** Requests in flight; 0 where the guest fills the queue. */
  readonly depth: number;
  /** Bytes of each. */
  readonly size: number;
}

/** Runs the guest with these words on its command line, and a VMM's devices. @returns what it printed. */
export type Vmm = (words: string) => Promise<string>;

/** Each in several configurations, by their names, since none is the best at everything. */
export interface Vmms {
  readonly tsvisor: Readonly<Record<string, Vmm>>;
  readonly qemu: Readonly<Record<string, Vmm>>;
}

/** What came of one run of the guest. */
export interface GuestResult {
  /** Operations a second, of each segment. */
  readonly rates: readonly number[];
  /** Operations, with those of the warm-up. */
  readonly total: number;
}

/** Wraps each run of a VMM, and may correct what came of it. */
export type Around = (run: () => Promise<GuestResult>) => Promise<GuestResult>;

const ROUNDS = 5;
const MEMORY_MIB = 128;

/**
 * Milliseconds of guest time before the first segment. What V8 has not optimized after some ten thousand requests it will
 * not: that takes two seconds where there is one request at a time, four beside other work. QEMU only has to touch its
 * memory.
 */
const WARM_UP = { tsvisor: 4000, qemu: 100 } as const;
const SEGMENT = 40;
const SEGMENTS = 5;

export const benchGuest = { path: () => compileUserGuest('virtio.c'), memory: MEMORY_MIB * 2 ** 20 } as const;

/**
 * tsvisor's command line: with the vCPU on the machine thread, which is one core, and with a thread of its own, where the
 * machine thread polls as QEMU's do. @param prefix words before it, which put it into a namespace.
 */
export function tsvisorCommands(devices: readonly string[], prefix: readonly string[] = []): Vmms['tsvisor'] {
  return {
    inline: tsvisorCommand(devices, prefix),
    'vcpu-threads': tsvisorCommand([...devices, '--vcpu-threads'], prefix),
  };
}

function tsvisorCommand(devices: readonly string[], prefix: readonly string[]): Vmm {
  const cli = fileURLToPath(import.meta.resolve('../../bin/tsvisor.js'));
  const machine = ['run', '--kernel', benchGuest.path(), '--memory', `${MEMORY_MIB}M`];
  const [program = '', ...args] = [...prefix, process.execPath, cli, ...machine, ...devices];
  return (words) => outputOf(program, [...args, '--append', words]);
}

/** @param prefix as of tsvisorCommand. */
export function qemuCommand(devices: readonly string[], prefix: readonly string[] = []): Vmm {
  const machine = [...qemuArguments(benchGuest.path(), MEMORY_MIB, true), '-serial', 'stdio'];
  const [program = '', ...args] = [...prefix, QEMU, ...machine, ...devices];
  return (words) => outputOf(program, [...args, '-append', words], QEMU_EXIT);
}

/**
 * Measures a workload by all VMMs in turn; of each one's configurations that with the best median counts, and what the
 * others came to is noted.
 * @param ticksPerSecond of the guest's TSC
 */
export async function compare(
  workload: Workload,
  vmms: Vmms,
  ticksPerSecond: number,
  { rounds = ROUNDS, note }: BenchOptions,
  around: Around = (run) => run(),
): Promise<Measurement> {
  const { name, unit, weight, bench, depth, size } = workload;
  const ticks = (milliseconds: number) => Math.round((ticksPerSecond * milliseconds) / 1e3);
  const measure = async (vmm: Vmm, warmUp: number) => {
    const times = `warmup=${ticks(warmUp)} segment=${ticks(SEGMENT)} segments=${SEGMENTS}`;
    const words = `bench=${bench} depth=${depth} size=${size} ${times}`;
    const { rates } = await around(async () => parse(await vmm(words), ticksPerSecond));
    return rates.map((rate) => rate * weight);
  };

  const contestants: Record<string, Contestant> = {};
  for (const [configuration, vmm] of Object.entries(vmms.tsvisor)) {
    contestants[`tsvisor ${configuration}`] = () => measure(vmm, WARM_UP.tsvisor);
  }
  for (const [configuration, vmm] of Object.entries(vmms.qemu)) {
    try {
      await measure(vmm, 0);
      contestants[`qemu ${configuration}`] = () => measure(vmm, WARM_UP.qemu);
    } catch (error) {
      note(`${name}: no QEMU with ${configuration}: ${error instanceof Error ? error.message : error}`);
    }
  }
  const samples = await interleave(rounds, contestants);
  const best = (vmm: keyof Vmms): readonly number[] | undefined => {
    const ranking = Object.keys(vmms[vmm])
      .map((configuration) => ({ configuration, figures: samples[`${vmm} ${configuration}`] ?? [] }))
      .filter(({ figures }) => figures.length > 0)
      .sort((a, b) => median(b.figures) - median(a.figures));
    const figures = ranking.map(({ configuration, figures }) => `${configuration} ${rounded(median(figures))}`);
    if (figures.length > 0) note(`${name}: ${vmm} ${figures.join('; ')} ${unit}`);
    return ranking[0]?.figures;
  };
  const [tsvisor = [], qemu] = [best('tsvisor'), best('qemu')];
  return { name, unit, better: 'higher', tsvisor, peers: qemu ? { qemu } : {} };
}

function parse(output: string, ticksPerSecond: number): GuestResult {
  const segments = [...output.matchAll(/^segment (\d+) (\d+)\r?$/gm)];
  const total = /^total (\d+)\r?$/m.exec(output)?.[1];
  if (segments.length !== SEGMENTS || total === undefined) throw new Error(`the bench guest printed ${output.trim()}`);
  const rates = segments.map(([, operations, ticks]) => (Number(operations) / Number(ticks)) * ticksPerSecond);
  return { rates, total: Number(total) };
}
