import path = require('node:path');
import threads = require('node:worker_threads');

/** Starts a machine thread: it loads its code and waits for its MachineThreadData. */
export = function startThread(): threads.Worker {
  // The same path from here and from the bundle of the command line.
  const entry = path.join(__dirname, '../machine/thread.cjs');
  return new threads.Worker(entry, { name: 'tsvisor-machine', execArgv: [] });
};
