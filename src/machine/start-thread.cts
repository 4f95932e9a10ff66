import path = require('node:path');
import threads = require('node:worker_threads');

/**
 * Starts a machine thread: it loads its code, makes what it can of its first machine, and waits for its ThreadOrder.
 * @param memory that this machine is expected to have, in bytes; undefined: the default, 0: that is not known
 * @param stdio whether the caller sees to what it prints: Node does so before it starts the thread, which takes 2 ms
 * @returns it, and where the messages of its machines come and go, one machine after the other
 */
export = function startThread(
  memory?: number,
  stdio = false,
): { readonly worker: threads.Worker; readonly port: threads.MessagePort } {
  // The same path from here and from the bundle of the command line.
  const entry = path.join(__dirname, '../machine/thread.cjs');
  const { port1: port, port2: there } = new threads.MessageChannel();
  const worker = new threads.Worker(entry, {
    name: 'tsvisor-machine',
    execArgv: [],
    workerData: { memory, port: there },
    transferList: [there],
    stdout: stdio,
    stderr: stdio,
  });
  return { worker, port };
};
