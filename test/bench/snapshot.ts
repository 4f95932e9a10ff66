import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Machine, SharedThread } from '#dist/index.js';
import { now } from '#dist/machine/end.js';
import { bootToRest } from './booted.js';
import { compileGuest } from './compile.js';
import { runReference } from './contestants.js';
import { interleave } from './interleave.js';
import type { Bench, BenchOptions, Measurement } from './result.js';

const ROUNDS = 30;
const CLONES = 100;
/** Clones that begin at a time. */
const AT_ONCE = 4;
/** Milliseconds for a command when a hundred guests have two cores. */
const PATIENCE = 1_800_000;
const MiB = 2 ** 20;

/** The default guest saved, restored and cloned. */
export const snapshot: Bench = {
  name: 'snapshot',
  describe: 'a booted Linux guest of 64 MiB saved, restored, and cloned a hundred times',
  async run(options) {
    const { note } = options;
    note('Firecracker publishes 4 to 10 ms for a restore, on bare metal');
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-bench-'));
    try {
      await using machine = await Machine.create();
      await bootToRest(machine);
      const saved = await saving(machine, folder, options);
      const path = join(folder, 'base');
      await machine.snapshot(path);
      await machine.close();
      return [...saved, ...(await restoring(path, options)), ...(await cloning(path))];
    } finally {
      rmSync(folder, { recursive: true });
    }
  },
};

/** How long the guest stands still, and what is written; between two it runs a command. */
async function saving(machine: Machine, folder: string, { rounds = ROUNDS }: BenchOptions): Promise<Measurement[]> {
  const full: { ms: number; mib: number }[] = [];
  const differential: typeof full = [];
  for (let round = 0; round < rounds; round++) {
    const base = join(folder, 'full');
    const layer = join(folder, 'layer');
    const first = await machine.snapshot(base, { track: true });
    full.push({ ms: first.pauseMs, mib: first.memoryBytes / MiB });
    await machine.exec('echo something > /tmp/something');
    const second = await machine.snapshot(layer, { differential: true });
    differential.push({ ms: second.pauseMs, mib: second.memoryBytes / MiB });
    rmSync(base, { recursive: true });
    rmSync(layer, { recursive: true });
  }
  const row = (name: string, unit: string, tsvisor: number[]): Measurement => {
    return { name, unit, better: 'lower', tsvisor, peers: {} };
  };
  return [
    row(
      'full snapshot, standstill',
      'ms',
      full.map(({ ms }) => ms),
    ),
    row(
      'full snapshot, written',
      'MiB',
      full.map(({ mib }) => mib),
    ),
    row(
      'differential snapshot after a command, standstill',
      'ms',
      differential.map(({ ms }) => ms),
    ),
    row(
      'differential snapshot after a command, written',
      'MiB',
      differential.map(({ mib }) => mib),
    ),
  ];
}

/**
 * From asking for it to the guest's first instruction: on a thread that has other machines, and on the thread
 * that had the machine before. `c` makes a new machine of the same size with the same KVM calls and reaches its first instruction:
 * what of it is KVM's.
 */
async function restoring(path: string, { rounds = ROUNDS }: BenchOptions): Promise<Measurement[]> {
  const elf = compileGuest('first.S');
  await using thread = new SharedThread();
  const restore = async (options: { thread?: SharedThread }) => {
    const start = now();
    await using machine = await Machine.restore(path, options);
    await machine.resume();
    const { firstEntry } = (await machine.metrics()).phases;
    await machine.exec('true');
    return { entry: (firstEntry as number) - start, command: now() - start };
  };
  const own: number[] = [];
  const command: number[] = [];
  const contestants = {
    tsvisor: async () => [(await restore({ thread })).entry],
    own: async () => {
      const times = await restore({});
      own.push(times.entry);
      command.push(times.command);
      return [times.entry];
    },
    c: () =>
      runReference(elf, 2)
        .slice(1)
        .map(([first]) => first as number),
  };
  await interleave(2, contestants);
  own.length = command.length = 0;
  const { tsvisor = [], c = [] } = await interleave(rounds, contestants);
  const name = 'restore to first instruction';
  const row = { unit: 'ms', better: 'lower' } as const;
  return [
    { ...row, name: `${name}, on a thread that has others`, tsvisor, peers: { c } },
    { ...row, name: `${name}, on a thread of its own`, tsvisor: own, peers: { c } },
    { ...row, name: 'restore to the end of a command in it', tsvisor: command, peers: {} },
  ];
}

/** Many at a time on one thread: as they are restored, and once each has renewed its identity and run a command. */
async function cloning(path: string): Promise<Measurement[]> {
  await using thread = new SharedThread();
  await using first = await Machine.restore(path, { thread }); // what the thread takes is not a clone's
  await first.resume();
  await first.exec('true');
  const clones: Machine[] = [];
  const before = memory();
  const start = now();
  while (clones.length < CLONES) clones.push(await Machine.restore(path, { thread }));
  const restored = (now() - start) / 1e3;
  const idle = memory();
  // A few at a time: a guest that hardly gets on gives up a request after 30 s of its own.
  let next = 0;
  const answer = async () => {
    for (let clone = clones[next++]; clone; clone = clones[next++]) {
      await clone.resume();
      await clone.exec('true', { timeout: PATIENCE });
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, answer));
  const answered = (now() - start) / 1e3;
  const used = memory();
  await Promise.all(clones.map((clone) => clone.close()));
  const each = (value: number) => value / CLONES / MiB;
  const row = (name: string, unit: string, value: number, better: 'lower' | 'higher' = 'lower'): Measurement => {
    return { name, unit, better, tsvisor: [value], peers: {} };
  };
  return [
    row(`${CLONES} clones restored`, 'clones/s', CLONES / restored, 'higher'),
    row(`${CLONES} clones restored, run, and a command of each ended`, 'clones/s', CLONES / answered, 'higher'),
    row('memory of a clone, resident (RSS)', 'MiB', each(idle.rss - before.rss)),
    row('memory of a clone, its share (PSS)', 'MiB', each(idle.pss - before.pss)),
    row('the same after a command (RSS)', 'MiB', each(used.rss - before.rss)),
    row('the same after a command (PSS)', 'MiB', each(used.pss - before.pss)),
  ];
}

/** Bytes of this process. */
function memory(): { rss: number; pss: number } {
  const text = readFileSync('/proc/self/smaps_rollup', 'latin1');
  const field = (name: string) => Number(new RegExp(`^${name}:\\s*(\\d+)`, 'm').exec(text)?.[1]) * 1024;
  return { rss: field('Rss'), pss: field('Pss') };
}
