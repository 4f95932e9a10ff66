import { Socket, type SocketConstructorOpts } from 'node:net';
import { parentPort, workerData } from 'node:worker_threads';
import type { PageSource, PageSourceMessage, PageSourceThreadData } from './page-source.js';

/** As addon/page_faults.h says of the channel. */
const CHUNK = 65536;
const WORD = 4;
const HEADER = 4 * WORD;
const DATA = 0;
const FAILURE = 1;
/** Characters of a reason. */
const MAX_REASON = 1000;

const { channel: fd, size, module, exportName, options } = workerData as PageSourceThreadData;
const channel = new Socket({ fd, readable: true, writable: true } as SocketConstructorOpts);
channel.on('error', () => {}); // the machine is gone, which 'close' tells as well

process.on('uncaughtException', (error) => fail(describe(error)));

/** Makes the source, and answers until the machine needs no more. */
async function serve(): Promise<void> {
  let source: PageSource;
  try {
    source = await make();
  } catch (error) {
    say(describe(error));
    process.exit();
  }
  say(undefined);
  let rest: Buffer = Buffer.alloc(0);
  channel.on('data', (bytes: Buffer) => {
    rest = Buffer.concat([rest, bytes]);
    for (; rest.length >= WORD; rest = rest.subarray(WORD)) void answer(source, rest.readUInt32LE());
  });
  channel.once('close', () => {
    void Promise.resolve(source.close?.()).finally(() => process.exit());
  });
}

async function make(): Promise<PageSource> {
  const namespace = (await import(module)) as Record<string, unknown>;
  const Make = namespace[exportName];
  if (typeof Make !== 'function') throw new Error(`its export '${exportName}' is neither a class nor a function`);
  const isClass = /^class\b/.test(Function.prototype.toString.call(Make));
  const source: unknown = await (isClass ? Reflect.construct(Make, [options]) : Make(options));
  if (typeof (source as Partial<PageSource> | undefined)?.read === 'function') return source as PageSource;
  throw new Error(`what its export '${exportName}' makes has no read()`);
}

async function answer(source: PageSource, chunk: number): Promise<void> {
  const offset = chunk * CHUNK;
  const into = new Uint8Array(Math.min(CHUNK, size - offset));
  try {
    const given: unknown = await source.read(offset, into);
    if (given !== into.length) throw new Error(`it gave ${String(given)} of ${into.length} bytes at ${offset}`);
    send(chunk, DATA, into);
  } catch (error) {
    fail(describe(error));
  }
}

/** The machine ends with this reason. */
function fail(reason: string): void {
  send(0, FAILURE, Buffer.from(reason.slice(0, MAX_REASON)));
}

function send(chunk: number, kind: number, bytes: Uint8Array): void {
  if (channel.destroyed) return;
  const header = Buffer.alloc(HEADER);
  header.writeUInt32LE(chunk);
  header.writeUInt32LE(kind, WORD);
  header.writeUInt32LE(bytes.length, 2 * WORD);
  channel.cork();
  channel.write(header);
  channel.write(bytes);
  channel.uncork();
}

function say(error: string | undefined): void {
  parentPort?.postMessage({ error } satisfies PageSourceMessage);
}

/** One line. */
function describe(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.replaceAll(/\s+/g, ' ');
}

await serve();
