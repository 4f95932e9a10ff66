import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { Random } from '../kvm/assist/random.js';
import { HostileDriver } from './hostile-driver.js';
import { FuzzMachine, Memory, Violation } from './machine.js';
import type { Target } from './target.js';

/** Operations of a case. */
const MIN_STEPS = 3;
const MORE_STEPS = 30;
/** A device whose vCPUs are held lets them go after so many events of its host. */
const MAX_HELD_EVENTS = 10_000;
/** What the host has left to do takes no more rounds than this. */
const MAX_SETTLING = 200;
/** What a run may leave behind in the process, in bytes: noise of the collector, not a leak of every case. */
const HEAP_SLACK = 24 << 20;

export interface RunOptions {
  readonly seed: number;
  readonly cases: number;
  /** Called after every few thousand cases. */
  readonly onProgress?: (done: number) => void;
}

/** A case that broke a rule. */
export class FuzzFailure extends Error {
  constructor(target: string, seed: number, index: number, trace: readonly string[], cause: unknown) {
    const why = cause instanceof Violation ? cause.message : cause instanceof Error ? cause.stack : String(cause);
    const steps = trace.map((step, i) => `  ${i}. ${step}`).join('\n');
    super(`${why}\n${steps}\nreplay: npm run fuzz -- ${target} --seed ${seed} --case ${index}`);
    this.name = 'FuzzFailure';
  }
}

/** Runs cases 0 to `cases` - 1 of a seed. @returns operations of guests and hosts. @throws FuzzFailure */
export function fuzz(target: Target, { seed, cases, onProgress }: RunOptions): number {
  using memory = new Memory();
  const warm = Math.min(2000, Math.ceil(cases / 4));
  let before = 0;
  let operations = 0;
  try {
    for (let index = 0; index < cases; index++) {
      if (index === warm) before = retained();
      try {
        operations += runCase(target, memory, seed, index);
      } catch (error) {
        throw new FuzzFailure(target.name, seed, index, traceOf(target, memory, seed, index), error);
      }
      if (index % 4096 === 4095) {
        memory.checkGuards();
        onProgress?.(index + 1);
      }
    }
    memory.checkGuards();
    const grown = retained() - before;
    if (grown > HEAP_SLACK) throw new Error(`${target.name}: ${cases} cases left ${grown} bytes behind (seed ${seed})`);
    return operations;
  } finally {
    target.dispose?.();
  }
}

/** Runs one case again and tells what it does. @throws FuzzFailure */
export function replay(target: Target, seed: number, index: number): string[] {
  using memory = new Memory();
  const trace: string[] = [];
  try {
    runCase(target, memory, seed, index, trace);
  } catch (error) {
    throw new FuzzFailure(target.name, seed, index, trace, error);
  } finally {
    target.dispose?.();
  }
  return trace;
}

/** @returns operations. @throws whatever breaks a rule */
function runCase(target: Target, memory: Memory, seed: number, index: number, trace?: string[]): number {
  const random = new Random(caseSeed(seed, index));
  memory.clear();
  const subject = target.subject(random, memory);
  const machine = new FuzzMachine(subject.device, memory, target.limits);
  machine.trace = trace;
  const driver = new HostileDriver(machine, subject, random);
  subject.attach?.(machine, driver.lawful);
  const release = () => {
    for (let n = 0; subject.held; n++) {
      if (n === MAX_HELD_EVENTS) throw new Violation('the vCPUs are held for ever');
      machine.perform(() => subject.hostEvent(random));
    }
  };
  for (let n = MIN_STEPS + random.below(MORE_STEPS); n > 0; n--) driver.step();
  release();
  for (let n = 0, more = driver.lawful; more && n < MAX_SETTLING; n++) {
    machine.perform(() => {
      more = subject.settle();
    });
  }
  driver.checkServed();
  // Whatever it was, a reset mends it.
  machine.perform(() => {
    machine.driver.status = 0;
  });
  release();
  trace?.push('reset, then a driver that behaves');
  machine.perform(() => subject.probe(machine));
  subject.end?.();
  trace?.push(`memory ${memory.digest}`);
  return machine.operations;
}

function traceOf(target: Target, memory: Memory, seed: number, index: number): string[] {
  const trace: string[] = [];
  try {
    runCase(target, memory, seed, index, trace);
    trace.push('(this time nothing went wrong: the case depends on what was before it, or on the host)');
  } catch {
    // as before
  }
  return trace;
}

/** The seed of a case. */
export function caseSeed(seed: number, index: number): number {
  let z = (seed ^ Math.imul(index + 1, 0x9e37_79b1)) >>> 0;
  z = Math.imul(z ^ (z >>> 16), 0x85eb_ca6b);
  z = Math.imul(z ^ (z >>> 13), 0xc2b2_ae35);
  return (z ^ (z >>> 16)) >>> 0;
}

let collect: (() => void) | undefined;

/** Bytes that the process keeps for JavaScript, buffers included. */
function retained(): number {
  if (!collect) {
    setFlagsFromString('--expose-gc');
    collect = runInNewContext('gc') as () => void;
  }
  collect();
  collect();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}
