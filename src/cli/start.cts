import path = require('node:path');
import bundle = require('../bundle.cjs');
import startThread = require('../machine/start-thread.cjs');

/** What bin/tsvisor.js runs. */
interface Program {
  main(argv: readonly string[], thread: ReturnType<typeof startThread> | undefined): Promise<void>;
}

const [, , command = '', ...args] = process.argv;
const host = ['run', 'restore'].includes(command) && !args.some((word) => /^(-d|--detach|-h|--help)$/.test(word));
// A machine's thread takes longer to start than all the rest: it does so while this thread reads the command line.
const usualMemory = command === 'run' && !args.some((word) => /^(-m|--memory)/.test(word));
const thread = host ? startThread(usualMemory ? undefined : 0, true) : undefined;
thread?.worker.stdout.pipe(process.stdout, { end: false });
thread?.worker.stderr.pipe(process.stderr, { end: false });

if (bundle.bundled) void (bundle.run(path.join(__dirname, 'main.cjs'), require) as Program).main(process.argv, thread);
else void import('./main.js').then(({ main }) => main(process.argv, thread));
