import { UsageError } from '../errors.js';
import type { ThreadOrder } from './messages.js';
import startThread from './start-thread.cjs';

export type MachineThread = ReturnType<typeof startThread>;

/** Each takes some 15 MiB. */
const MAX_WARM = 64;

/** Threads that have loaded their code and wait for a machine. The first is taken first. */
const waiting: MachineThread[] = [];
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
export function takeThread(size = memory): MachineThread {
  memory = size || memory;
  const thread = waiting.shift() ?? startThread(size);
  thread.worker.removeAllListeners();
  thread.worker.ref();
  // Not before this machine has had its turn.
  if (waiting.length < wanted) setTimeout(() => fill(), REFILL_DELAY).unref();
  return thread;
}

/** Milliseconds. */
const REFILL_DELAY = 20;

/** Takes back a thread whose machine has left nothing on it: its code is compiled, so that it is the best one for the next. */
export function giveBack(thread: MachineThread): void {
  thread.worker.removeAllListeners();
  watch(thread);
  waiting.unshift(thread);
  trim();
  if (waiting[0] === thread) tell(thread, { prepare: memory ?? 0 });
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
  for (const thread of waiting.splice(most)) tell(thread, 'end');
}

function tell({ worker }: MachineThread, order: ThreadOrder): void {
  worker.postMessage(order);
}

/** Adds one that was started elsewhere. */
export function offerThread(thread: MachineThread): void {
  watch(thread);
  waiting.push(thread);
}

function watch(thread: MachineThread): void {
  const { worker } = thread;
  worker.unref();
  const forget = () => {
    const index = waiting.indexOf(thread);
    if (index >= 0) waiting.splice(index, 1);
  };
  worker.on('error', forget); // whoever needs one will see the error of his own
  worker.once('exit', forget);
}
