import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { now } from '#dist/machine/end.js';
import { Machine } from '#dist/machine/machine.js';
import { compileGuest, compileReference } from './compile.js';
import { QEMU, QEMU_EXIT, qemuArguments, runMachine, runReference, timeProcess } from './contestants.js';
import { type Contestant, interleave, whoCan } from './interleave.js';
import type { Bench, BenchOptions, Measurement, Peer } from './result.js';

const ROUNDS = 15;

/** Milliseconds that a thread has to get ready. */
const READY = 500;

/** Milliseconds that KVM has to undo a VM. */
const UNDONE = 100;

/** How long until a guest's first instruction, and how long a whole process takes whose guest ends with it. */
export const startup: Bench = {
  name: 'startup',
  describe: 'machine made to first guest instruction, and the whole command line',
  async run(options) {
    return [
      await warmProcess(options),
      await warmThread(options),
      await newThread(options),
      await commandLine(options),
    ];
  },
};

/**
 * Machine after machine in one process: from the second on they have the thread of the one before. Each comes when KVM has
 * undone the VM of that, as with C, which waits for it and does not count it.
 */
async function warmProcess({ rounds = ROUNDS }: BenchOptions): Promise<Measurement> {
  const elf = compileGuest('first.S');
  const contestants = {
    tsvisor: async () => {
      await delay(UNDONE);
      return (await runMachine(elf)).slice(0, 1);
    },
    // The first machine of the process warms it; the second counts.
    c: () => runReference(elf, 2).slice(1).flatMap(first),
  };
  await interleave(2, contestants);
  const { tsvisor = [], ...peers } = await interleave(rounds, contestants);
  return { name: 'machine to first instruction, warm process', unit: 'ms', better: 'lower', tsvisor, peers };
}

/** With a thread that has had no machine yet but was started ahead (Machine.keepWarm), and has had time to get ready. */
async function warmThread({ rounds = ROUNDS }: BenchOptions): Promise<Measurement> {
  const elf = compileGuest('first.S');
  const contestants = {
    tsvisor: async () => {
      Machine.keepWarm(0);
      Machine.keepWarm(1);
      await delay(READY);
      return (await runMachine(elf)).slice(0, 1);
    },
    c: () => runReference(elf, 2).slice(1).flatMap(first),
  };
  await interleave(1, contestants);
  const { tsvisor = [], ...peers } = await interleave(rounds, contestants);
  return { name: 'machine to first instruction, thread kept ready', unit: 'ms', better: 'lower', tsvisor, peers };
}

/** Each on a thread of its own. `node` is a Worker that does nothing until its first line: what such a thread costs in Node. */
async function newThread({ rounds = ROUNDS }: BenchOptions): Promise<Measurement> {
  const elf = compileGuest('first.S');
  Machine.keepWarm(0);
  const contestants = {
    tsvisor: async () => (await runMachine(elf)).slice(0, 1),
    c: () => runReference(elf, 2).slice(1).flatMap(first),
    node: async () => [await startWorker()],
  };
  await interleave(1, contestants);
  const { tsvisor = [], ...peers } = await interleave(rounds, contestants);
  Machine.keepWarm(1); // from now on threads are used again
  return { name: 'machine to first instruction, new thread', unit: 'ms', better: 'lower', tsvisor, peers };
}

function first(stamps: readonly number[]): number[] {
  return stamps.slice(0, 1);
}

/** Time in ms from asking for an empty Worker to the first thing it does. */
async function startWorker(): Promise<number> {
  const start = now();
  const code = `require('node:worker_threads').parentPort.postMessage(process.hrtime())`;
  const worker = new Worker(code, { eval: true, execArgv: [] });
  const [seconds, nanoseconds] = await new Promise<[number, number]>((resolve, reject) => {
    worker.once('message', resolve);
    worker.once('error', reject);
  });
  await worker.terminate();
  return seconds * 1e3 + nanoseconds / 1e6 - start;
}

/** Whole processes: VMMs whose guest ends at once, and a Node that does nothing. */
async function commandLine({ rounds = ROUNDS }: BenchOptions): Promise<Measurement> {
  const elf = compileGuest('first.S');
  const cli = fileURLToPath(import.meta.resolve('../../bin/tsvisor.js'));
  const reference = compileReference('vmm.c');
  const qemu = qemuArguments(compileGuest('first.S', { PVH: 1 }), 64, false);
  const { able, absent } = await whoCan<'tsvisor' | Peer, Contestant>({
    tsvisor: () => [timeProcess(process.execPath, [cli, 'run', '--kernel', elf, '--serial', 'none'])],
    c: () => [timeProcess(reference, [elf])],
    node: () => [timeProcess(process.execPath, ['-e', '0'])],
    qemu: () => [timeProcess(QEMU, qemu, QEMU_EXIT)],
  });
  if (absent.tsvisor !== undefined) throw new Error(absent.tsvisor);
  const { tsvisor = [], ...peers } = await interleave(rounds, able);
  return { name: 'command line, start to end', unit: 'ms', better: 'lower', tsvisor, peers, absent };
}
