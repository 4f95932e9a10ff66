import { Machine } from '#dist/index.js';
import { Random } from '../../kvm/assist/random.js';
import { resources } from '../../support/process-resources.js';
import { Violation } from '../machine.js';
import { caseSeed, FuzzFailure, type RunOptions } from '../run.js';
import { mutate } from './mutate.js';
import { SnapshotSubject } from './subject.js';

export const SNAPSHOT = 'snapshot';
/** Every so many cases one is a machine of its own thread. */
const WHOLE_MACHINE = 20;

/**
 * Restores crafted snapshots. Each is refused with an error of tsvisor's in one line, or is a machine that runs or ends.
 * @returns how many ended how. @throws FuzzFailure
 */
export async function fuzzSnapshots({ seed, cases, onProgress }: RunOptions): Promise<Record<string, number>> {
  Machine.keepWarm(0); // what waits for a machine is no leak
  using subject = await SnapshotSubject.create();
  const outcomes: Record<string, number> = {};
  await subject.run(mutate(subject.state, new Random(0)).bytes).catch(() => {}); // what is loaded once is loaded
  const before = resources();
  for (let index = 0; index < cases; index++) {
    const outcome = await runCase(subject, seed, index);
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
    onProgress?.(index + 1);
  }
  const { descriptors, threads } = resources();
  if (descriptors > before.descriptors + 8 || threads > before.threads + 4) {
    throw new Error(`${descriptors - before.descriptors} descriptors, ${threads - before.threads} threads are left`);
  }
  return outcomes;
}

/** Runs one case again. @returns what it does. @throws FuzzFailure */
export async function replaySnapshot(seed: number, index: number): Promise<string[]> {
  using subject = await SnapshotSubject.create();
  const { steps } = mutate(subject.state, new Random(caseSeed(seed, index)));
  return [...steps, await runCase(subject, seed, index)];
}

async function runCase(subject: SnapshotSubject, seed: number, index: number): Promise<string> {
  const { bytes, whole, steps } = mutate(subject.state, new Random(caseSeed(seed, index)));
  try {
    const outcome = index % WHOLE_MACHINE === 0 ? await subject.runMachine(bytes) : await subject.run(bytes);
    if (!whole && outcome !== 'ERR_SNAPSHOT' && !steps.includes('a byte of the file')) throw new Violation(outcome);
    return outcome;
  } catch (error) {
    throw new FuzzFailure(SNAPSHOT, seed, index, steps, error);
  }
}
