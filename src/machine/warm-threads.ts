import type { Worker } from 'node:worker_threads';
import { UsageError } from '../errors.js';
import type { ThreadOrder } from './messages.js';
import startThread from './start-thread.cjs';

/** Each takes some 10 MiB. */
const MAX_WARM = 64;

/** Threads that have loaded their code and wait for a machine. The first is taken first. */
const waiting: Worker[] = [];
/** Threads to be started ahead. */
let wanted = 0;
/** Threads that may wait: those, and one that has had a machine. */
let most = 1;
/** Of the last machine: the next is likely to have as much. */
let memory: number | undefined;

/** Keeps so many threads ready for machines to come; see Machine.keepWarm(). They do not keep the process from ending. */
export function keepWarm(count: number): void {
  if (!Number.isInteger(count) || count < 0 || count > MAX_WARM) {
    throw new UsageError(`keepWarm: ${count} is not a number of threads from 0 to ${MAX_WARM}`);
  }
  wanted = count;
  most = count === 0 ? 0 : count + 1;
  trim();
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

/** Takes back a thread whose machine has left nothing on it: its code is compiled, so that it is the best one for the next. */
export function giveBack(worker: Worker): void {
  worker.removeAllListeners();
  watch(worker);
  waiting.unshift(worker);
  trim();
  if (waiting[0] === worker) tell(worker, { prepare: memory ?? 0 });
}

/** Sees to it that one is ready for a machine that is to come soon, with memory of its own. */
export function warmUp(): void {
  if (waiting.length === 0) offerThread(startThread(0));
}

function fill(): void {
  while (waiting.length < wanted) offerThread(startThread(memory));
}

/** Ends those that are too many. By themselves: one that is terminated while it loads leaves descriptors open. */
function trim(): void {
  for (const worker of waiting.splice(most)) tell(worker, 'end');
}

function tell(worker: Worker, order: ThreadOrder): void {
  worker.postMessage(order);
}

/** Adds one that was started elsewhere. */
export function offerThread(worker: Worker): void {
  watch(worker);
  waiting.push(worker);
}

function watch(worker: Worker): void {
  worker.unref();
  const forget = () => {
    const index = waiting.indexOf(worker);
    if (index >= 0) waiting.splice(index, 1);
  };
  worker.on('error', forget); // whoever needs one will see the error of his own
  worker.once('exit', forget);
}
