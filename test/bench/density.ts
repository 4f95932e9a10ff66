import { type ChildProcess, fork, spawn } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { withBootedGuest } from './booted.js';
import { compileGuest, compileReference } from './compile.js';
import { QEMU, qemuArguments } from './contestants.js';
import type { DensityOrder } from './density-process.js';
import { type Footprint, footprint } from './footprint.js';
import { interleave } from './interleave.js';
import type { Bench, BenchOptions, Measurement, Peer } from './result.js';

const MACHINES = 100;
/** Processes of a peer that runs a machine in each: they are all alike. */
const PROCESSES = 5;
const ROUNDS = 3;
/** Milliseconds: for what comes after a machine's start to be over, and then of idleness that is measured. */
const SETTLE = 3000;
const IDLE = 5000;
const MiB = 2 ** 20;

/** What a machine costs beside its guest's RAM. */
interface Cost {
  /** Bytes. */
  readonly pss: number;
  readonly rss: number;
  readonly guest: number;
  /** Percent of a core. */
  readonly cpu: number;
  /** To user space, a second; undefined where nobody counts them. */
  readonly exits: number | undefined;
  readonly descriptors: number;
  readonly threads: number;
}

/** Some machines that run and have nothing to do. */
interface Idle {
  readonly machines: number;
  readonly pids: readonly number[];
  /** What the processes were before they had machines; undefined where a process is there for its machine alone. */
  readonly before: Footprint | undefined;
  /** So far, of all of them. */
  exits(): Promise<number> | undefined;
  end(): Promise<void>;
}

type Contestants = { readonly tsvisor: () => Promise<Idle> } & Partial<Record<Peer, () => Promise<Idle>>>;

/** Many machines on one host, none of which has anything to do. */
export const density: Bench = {
  name: 'density',
  describe: 'many idle machines in a process: memory beyond guest RAM, processor time, descriptors, threads',
  async run(options) {
    const { machines = MACHINES } = options;
    const elf = compileGuest('idle.S');
    const c = () => inProcesses(compileReference('vmm.c'), [elf]);
    const qemu = () => inProcesses(QEMU, [...qemuArguments(elf, 64, true), '-serial', 'stdio']);
    return await withBootedGuest(options, async (snapshot) => {
      const measurements: Measurement[] = [];
      for (const shared of [true, false]) {
        const name = `${machines} machines, ${shared ? 'all on one thread' : 'a thread each'}`;
        const halted = () => inOneProcess({ machines, shared, guest: { kernel: elf } });
        const linux = () => inOneProcess({ machines, shared, guest: { snapshot } });
        measurements.push(...(await each(`${name}, halted guest`, options, { tsvisor: halted, c, qemu })));
        measurements.push(...(await each(`${name}, idle Linux`, options, { tsvisor: linux })));
      }
      return measurements;
    });
  },
};

async function each(name: string, { rounds = ROUNDS }: BenchOptions, contestants: Contestants): Promise<Measurement[]> {
  const costs = new Map<string, Cost[]>();
  const absent: Partial<Record<Peer, string>> = {};
  const turns = Object.entries(contestants).map(([who, start]) => {
    const turn = async () => {
      if (absent[who as Peer] !== undefined) return [];
      try {
        costs.set(who, [...(costs.get(who) ?? []), await measure(start)]);
      } catch (error) {
        if (who === 'tsvisor') throw error;
        absent[who as Peer] = error instanceof Error ? error.message : String(error);
      }
      return [];
    };
    return [who, turn] as const;
  });
  await interleave(rounds, Object.fromEntries(turns));

  const row = (what: string, unit: string, of: (cost: Cost) => number | undefined): Measurement => {
    const samples = [...costs].map(
      ([who, list]) => [who, list.map(of).filter((value) => value !== undefined)] as const,
    );
    const { tsvisor = [], ...peers } = Object.fromEntries(samples.filter(([, list]) => list.length > 0));
    return { name: `${name}: ${what}`, unit, better: 'lower', tsvisor, peers, absent };
  };
  return [
    row('memory beyond guest RAM (PSS)', 'MiB each', ({ pss }) => pss / MiB),
    row('the same, resident (RSS)', 'MiB each', ({ rss }) => rss / MiB),
    row('guest RAM in memory (PSS)', 'MiB each', ({ guest }) => guest / MiB),
    row('processor time', '% of a core each', ({ cpu }) => cpu),
    row('exits to user space', '1/s each', ({ exits }) => exits),
    row('descriptors', 'each', ({ descriptors }) => descriptors),
    row('threads', 'each', ({ threads }) => threads),
  ];
}

async function measure(contestant: () => Promise<Idle>): Promise<Cost> {
  const idle = await contestant();
  try {
    await setTimeout(SETTLE);
    const { machines, pids, before } = idle;
    const exits = await idle.exits();
    const start = footprint(pids);
    await setTimeout(IDLE);
    const end = footprint(pids);
    const exitsAtEnd = await idle.exits();
    const share = (of: (footprint: Footprint) => number) => (of(end) - (before ? of(before) : 0)) / machines;
    return {
      pss: share(({ pss }) => pss),
      rss: share(({ rss }) => rss),
      guest: share(({ guestPss }) => guestPss),
      cpu: ((end.cpu - start.cpu) / IDLE / machines) * 100,
      exits: exits === undefined ? undefined : (((exitsAtEnd ?? exits) - exits) / machines / IDLE) * 1e3,
      descriptors: share(({ descriptors }) => descriptors),
      threads: share(({ threads }) => threads),
    };
  } finally {
    await idle.end();
  }
}

/** tsvisor's machines, all in one process. */
async function inOneProcess(order: DensityOrder): Promise<Idle> {
  const child = fork(fileURLToPath(import.meta.resolve('./density-process.ts')));
  const answer = async (message?: DensityOrder | 'exits') => {
    if (message) child.send(message);
    const [said] = (await Promise.race([once(child, 'message'), once(child, 'exit')])) as [number | string | null];
    if (typeof said === 'number' && child.connected) return said;
    throw new Error(`the process with ${order.machines} machines failed: ${said}`);
  };
  try {
    await answer();
    const pids = [child.pid as number];
    const before = footprint(pids);
    await answer(order);
    return { machines: order.machines, pids, before, exits: () => answer('exits'), end: () => ended(child) };
  } catch (error) {
    await ended(child);
    throw error;
  }
}

/** A peer's machines, a process each: they say something when their guest runs. */
async function inProcesses(program: string, args: readonly string[]): Promise<Idle> {
  const children: ChildProcess[] = [];
  try {
    for (let i = 0; i < PROCESSES; i++) {
      const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'] });
      children.push(child);
      let errors = '';
      child.stderr.setEncoding('utf8').on('data', (text) => {
        errors += text;
      });
      const spoke = once(child.stdout, 'data').then(() => true);
      const closed = once(child, 'close').then(() => false); // an `error` event rejects it
      if (!(await Promise.race([spoke, closed]))) throw new Error(errors.trim().split('\n')[0]);
    }
  } catch (error) {
    await Promise.all(children.map(ended));
    throw error;
  }
  return {
    machines: PROCESSES,
    pids: children.map(({ pid }) => pid as number),
    before: undefined,
    exits: () => undefined,
    end: async () => void (await Promise.all(children.map(ended))),
  };
}

async function ended(child: ChildProcess): Promise<void> {
  if (child.pid === undefined || child.exitCode !== null || child.signalCode !== null) return;
  const exited = once(child, 'exit');
  child.kill('SIGKILL');
  await exited;
}
