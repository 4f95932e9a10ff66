import { closeSync, fstatSync, openSync, readSync, statSync, watch } from 'node:fs';
import type { ArgumentsCamelCase, Argv } from 'yargs';
import { TsvisorError } from '../errors.js';
import { ControlClient, notFound } from './machines/control-client.js';
import { isRunning, pathsOf } from './machines/machine-folder.js';
import { olderPart } from './machines/rotating-log.js';
import { parseNumber } from './number.js';
import { abortOnSignals } from './signals.js';
import { TerminalText } from './terminal-text.js';
import { writeAll } from './write-all.js';

const CHUNK = 65_536;

export function builder(yargs: Argv) {
  return yargs
    .positional('name', { type: 'string', demandOption: true, describe: 'of the machine; see tsvisor ps' })
    .option('follow', { alias: 'f', type: 'boolean', default: false, describe: 'go on until the machine ends' })
    .option('lines', { alias: 'n', type: 'string', requiresArg: true, describe: 'only the last so many lines' })
    .option('process', {
      type: 'boolean',
      default: false,
      describe: 'what the process of a detached machine said (--log-level), not the guest’s console',
    })
    .example('$0 logs web', 'what the guest’s console said: the last megabyte or two')
    .example('$0 logs -f -n 10 web', 'the last ten lines, and on')
    .example('$0 logs --process web', 'why a detached machine is not well');
}

type LogsArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler(args: LogsArguments): Promise<void> {
  const lines = args.lines === undefined ? Infinity : parseNumber('lines', args.lines, 'a number of lines', 0, 1e9);
  const { name, consoleLog, processLog, folder } = pathsOf(args.name);
  const path = args.process ? processLog : consoleLog;
  if (!statSync(path, { throwIfNoEntry: false })) {
    if (isRunning(name)) throw new TsvisorError('ERR_USAGE', `machine ${name} has no such log: it is not detached`);
    throw notFound(name);
  }
  using client = args.follow && isRunning(name) ? await ControlClient.connect(name) : undefined;
  using file = new FollowedFile(path);
  const text = process.stdout.isTTY ? new TerminalText() : undefined;
  const show = (chunk: Buffer) => writeAll(text ? text.push(chunk) : chunk);
  if (!(await show(lastLines([...readWhole(olderPart(path)), ...file.more()], lines))) || !client) return;
  using interrupt = abortOnSignals();
  const ended = client.request('wait', {}, { timeout: Infinity, signal: interrupt.signal }).then(
    () => {},
    () => {},
  );
  let over = false;
  let wake = () => {};
  const watcher = watch(folder, () => wake());
  watcher.on('error', () => {}); // the folder went with the machine
  const finish = () => {
    over = true;
    wake();
  };
  void ended.then(finish);
  process.stdout.on('error', finish); // nobody reads it any more
  try {
    for (;;) {
      const changed = new Promise<void>((resolve) => {
        wake = resolve;
      });
      const last = over; // then nothing comes after this
      for (const chunk of file.more()) if (!(await show(chunk))) return;
      if (last) break;
      if (!over) await changed;
    }
  } finally {
    watcher.close();
  }
  interrupt.signal.throwIfAborted();
}

/** A log that is written to, and now and then renamed and begun anew. */
class FollowedFile implements Disposable {
  readonly #path: string;
  #fd: number;

  constructor(path: string) {
    this.#path = path;
    this.#fd = openSync(path, 'r');
  }

  /** What was written since. */
  *more(): Generator<Buffer> {
    yield* readRest(this.#fd);
    const there = statSync(this.#path, { throwIfNoEntry: false });
    if (!there || there.ino === fstatSync(this.#fd).ino) return;
    yield* readRest(this.#fd); // between the two
    const next = openSync(this.#path, 'r');
    closeSync(this.#fd);
    this.#fd = next;
    yield* readRest(next);
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd);
  }
}

function* readRest(fd: number): Generator<Buffer> {
  for (;;) {
    const buffer = Buffer.alloc(CHUNK);
    const count = readSync(fd, buffer);
    if (count === 0) return;
    yield buffer.subarray(0, count);
  }
}

function readWhole(path: string): Buffer[] {
  if (!statSync(path, { throwIfNoEntry: false })) return [];
  const fd = openSync(path, 'r');
  try {
    return [...readRest(fd)];
  } finally {
    closeSync(fd);
  }
}

function lastLines(chunks: readonly Buffer[], count: number): Buffer {
  const all = Buffer.concat(chunks);
  if (count === Infinity) return all;
  let start = all.length;
  // The line that the log ends in counts, finished or not.
  for (let left = count; left > 0 && start > 0; left--) start = all.lastIndexOf('\n', start - 2) + 1;
  return all.subarray(start);
}
