import type { Readable, Writable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { ByteQueue } from '../backends/byte-queue.js';
import type { ConsoleSize } from '../backends/port-stream.js';
import { GuestError, TsvisorError, UsageError } from '../errors.js';
import { checkSize, type GuestProcess, type ProcessExit } from './process.js';
import { ExecFlag, FrameType, FrameWriter, MAX_ARGUMENTS } from './protocol.js';

/** How to run a program in the guest. */
export interface SpawnOptions {
  /**
   * Arguments, perhaps none: then the command is a program, found by PATH. Without `args` it is a command line for
   * /bin/sh.
   */
  readonly args?: readonly string[];
  /** Added to PATH, HOME, USER, LOGNAME, SHELL and, on a terminal, TERM, which it may replace. */
  readonly env?: Readonly<Record<string, string>>;
  /** Working directory; default the user's home. */
  readonly cwd?: string;
  /** Whom it runs as: a name or a uid, and perhaps `:` and a group or gid. Default the agent's own user, root. */
  readonly user?: string;
  /** Whether it gets a terminal, and of what size (default 24 by 80) and type (TERM, default linux). */
  readonly tty?: boolean | (ConsoleSize & { readonly term?: string });
  /** The process goes on when the connection to it is lost, and when this program ends. Default false. */
  readonly detached?: boolean;
  /** Milliseconds after which the process group is ended, with ERR_TIMEOUT; of exec(), with all of its output. */
  readonly timeout?: number;
  /** Ends the process group, with the reason; once that has exited, what is left of its output. */
  readonly signal?: AbortSignal;
}

export interface ExecOptions extends SpawnOptions {
  /** What it reads; default nothing. */
  readonly stdin?: string | Uint8Array | AsyncIterable<Uint8Array>;
  /** Bytes of stdout, and of stderr, that are collected; more end the process with ERR_EXEC (ENOBUFS). Default 64 MiB. */
  readonly maxBuffer?: number;
  /** `utf8` (default): the result has strings; `buffer`: Buffers. */
  readonly encoding?: 'utf8' | 'buffer';
}

/** What a program did; that its code is not 0 is no error. */
export interface ExecResult<Output extends string | Buffer = string> extends ProcessExit {
  readonly stdout: Output;
  readonly stderr: Output;
}

const DEFAULT_MAX_BUFFER = 64 * 1024 * 1024;
/** setTimeout's longest. */
const MAX_TIMEOUT = 2 ** 31 - 1;

/** The EXEC request. @throws UsageError that names the option. */
export function execRequest(command: string, options: SpawnOptions): Buffer {
  const { args, env = {}, cwd = '', user = '', tty = false, detached = false, timeout } = options;
  if (typeof command !== 'string' || command === '') throw new UsageError('command: a command is needed');
  if (timeout !== undefined && !(timeout > 0 && timeout <= MAX_TIMEOUT)) {
    throw new UsageError(`timeout: ${timeout} is not a number of milliseconds from 1 to ${MAX_TIMEOUT}`);
  }
  const { rows = 24, columns = 80, term = undefined } = typeof tty === 'object' ? tty : {};
  checkSize(rows, columns);
  const variables = { ...(tty && term !== undefined ? { TERM: term } : {}), ...env };
  const flags = (tty ? ExecFlag.tty : 0) | (detached ? ExecFlag.detached : 0);
  const writer = new FrameWriter(FrameType.exec).u32(flags).u32(rows).u32(columns);
  writer.string(cwd, 'cwd').string(user, 'user');
  if (args !== undefined && !Array.isArray(args)) throw new UsageError('args: must be an array');
  const words = args === undefined ? ['/bin/sh', '-c', command] : [command, ...args];
  const pairs = Object.entries(variables).map(([name, value]) => {
    if (name === '' || name.includes('=')) throw new UsageError(`env: '${name}' is no name of a variable`);
    if (typeof value !== 'string') throw new UsageError(`env.${name}: must be text`);
    return `${name}=${value}`;
  });
  if (!words.every((word) => typeof word === 'string')) throw new UsageError('command and args: must be text');
  const size = [...words, ...pairs].reduce((sum, text) => sum + Buffer.byteLength(text) + 1, 0);
  if (size > MAX_ARGUMENTS) {
    throw new UsageError(`args and env have ${size} bytes; at most ${MAX_ARGUMENTS} are possible; use stdin or a file`);
  }
  writer.u32(words.length);
  for (const word of words) writer.string(word, args === undefined ? 'command' : 'args', MAX_ARGUMENTS);
  writer.u32(pairs.length);
  for (const pair of pairs) writer.string(pair, 'env', MAX_ARGUMENTS);
  return writer.frame();
}

/** Feeds a process and collects what it writes until it has exited. */
export async function collect(
  process: GuestProcess,
  { stdin, maxBuffer = DEFAULT_MAX_BUFFER, encoding = 'utf8' }: ExecOptions,
): Promise<ExecResult<string | Buffer>> {
  await using running = process;
  const fed = feed(running.stdin, stdin).catch((error) => running.terminate(error));
  const [stdout, stderr, exit] = await Promise.all([
    gather(running.stdout, maxBuffer, 'stdout'),
    gather(running.stderr, maxBuffer, 'stderr'),
    running.exited,
    fed,
  ]);
  if (encoding === 'buffer') return { ...exit, stdout, stderr };
  return { ...exit, stdout: stdout.toString(), stderr: stderr.toString() };
}

async function feed(to: Writable, input: ExecOptions['stdin']): Promise<void> {
  if (input === undefined || typeof input === 'string' || input instanceof Uint8Array) {
    to.end(input);
    return;
  }
  try {
    await pipeline(input, to);
  } catch (error) {
    // That the process did not read it all is its own affair, as with a shell's pipe. The rest is the input's failure.
    if (!to.destroyed || (to.errored && to.errored !== error)) throw error;
    if (!isClosed(error)) throw error;
  }
}

function isClosed(error: unknown): boolean {
  if (error instanceof TsvisorError) return true; // the connection's: `exited` rejects with it
  const code = error instanceof Error && 'code' in error ? error.code : undefined;
  return code === 'EPIPE' || code === 'ERR_STREAM_PREMATURE_CLOSE';
}

/** All of a stream. It may fail although the process has exited: then not all has come. */
function gather(stream: Readable, limit: number, name: string): Promise<Buffer> {
  const bytes = new ByteQueue(); // the guest chooses how small its pieces are
  return new Promise((resolve, reject) => {
    stream.on('data', (chunk: Buffer) => {
      bytes.push(chunk);
      if (bytes.length <= limit) return;
      const message = `the process wrote more than ${limit} bytes to ${name}; raise maxBuffer, or use spawn()`;
      stream.destroy(new GuestError('ERR_EXEC', 'ENOBUFS', message));
    });
    stream.on('close', () => (stream.errored ? reject(stream.errored) : resolve(bytes.toBuffer())));
  });
}
