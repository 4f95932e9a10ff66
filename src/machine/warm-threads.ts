import type { Worker } from 'node:worker_threads';
import { UsageError } from '../errors.js';
import startThread from './start-thread.cjs';

/** Each takes some 10 MiB. */
const MAX_WARM = 64;

/** Threads that have loaded their code and wait for a machine. */
const waiting: Worker[] = [];
let wanted = 0;
/** Of the last machine: the next is likely to have as much. */
let memory: number | undefined;

/** Keeps so many threads ready for machines to come; see Machine.keepWarm(). They do not keep the process from ending. */
export function keepWarm(count: number): void {
  if (!Number.isInteger(count) || count < 0 || count > MAX_WARM) {
    throw new UsageError(`keepWarm: ${count} is not a number of threads from 0 to ${MAX_WARM}`);
  }
  wanted = count;
  for (const worker of waiting.splice(wanted)) void worker.terminate();
  fill();
}

/**
 * A thread, which waits for its ThreadOrder. The caller owns it.
 * @param size of its first machine's memory, in bytes; 0 where that cannot be made ahead
 */
export function takeThread(size = memory): Worker {
  memory = size || memory;
  const worker = waiting.shift() ?? startThread(size);
  worker.removeAllListeners();
  worker.ref();
  // Not before this machine has had its turn.
  if (waiting.length < wanted) setTimeout(() => fill(), REFILL_DELAY).unref();
  return worker;
}

/** Milliseconds. */
const REFILL_DELAY = 20;

/** Sees to it that one is ready for a machine that is to come soon, with memory of its own. */
export function warmUp(): void {
  if (waiting.length === 0) offerThread(startThread(0));
}

function fill(): void {
  while (waiting.length < wanted) offerThread(startThread(memory));
}

/** Adds one that was started elsewhere. */
export function offerThread(worker: Worker): void {
  worker.unref();
  const forget = () => {
    const index = waiting.indexOf(worker);
    if (index >= 0) waiting.splice(index, 1);
  };
  worker.once('error', forget); // whoever needs one will see the error of his own
  worker.once('exit', forget);
  waiting.push(worker);
}
