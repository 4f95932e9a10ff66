import { SIGNAL_EXIT } from './exit-codes.js';

/** Calls back for each signal that asks this process to end. @returns what undoes it. */
export function onSignals(callback: (code: number, signal: NodeJS.Signals) => void): () => void {
  const handlers = Object.entries(SIGNAL_EXIT).map(([name, code]) => {
    const signal = name as NodeJS.Signals;
    const onSignal = () => callback(code, signal);
    process.on(signal, onSignal);
    return () => process.removeListener(signal, onSignal);
  });
  return () => {
    for (const remove of handlers) remove();
  };
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
