import { SIGNAL_EXIT } from './exit-codes.js';

/** @returns false where it only wants to know: then the signal is for others, or does what it always does. */
type SignalCallback = (code: number, signal: NodeJS.Signals) => unknown;

const callbacks = new Set<SignalCallback>();
let listens = false;

/** Calls back for each signal that asks this process to end. @returns what undoes it. */
export function onSignals(callback: SignalCallback): () => void {
  // Once and for all: a signal that came, and that Node has not told yet, is lost with the last listener to it.
  if (!listens) for (const name of Object.keys(SIGNAL_EXIT)) process.on(name, dispatch);
  listens = true;
  const own: SignalCallback = (code, signal) => callback(code, signal); // one may be there twice
  callbacks.add(own);
  return () => callbacks.delete(own);
}

function dispatch(signal: keyof typeof SIGNAL_EXIT): void {
  let taken = false;
  for (const callback of [...callbacks]) if (callback(SIGNAL_EXIT[signal], signal) !== false) taken = true;
  if (taken) return;
  process.removeListener(signal, dispatch);
  process.kill(process.pid, signal);
}

/** Aborts on a signal, after which the process has the exit code that goes with it. */
export function abortOnSignals(): { readonly signal: AbortSignal } & Disposable {
  const controller = new AbortController();
  const remove = onSignals((code, signal) => controller.abort(new SignalError(signal, code)));
  return { signal: controller.signal, [Symbol.dispose]: remove };
}

/** The reason of what a signal aborted: nothing need be said about it. */
export class SignalError extends Error {
  readonly exitCode: number;

  constructor(signal: NodeJS.Signals, exitCode: number) {
    super(`ended by ${signal}`);
    this.exitCode = exitCode;
  }
}
