import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { RotatingLog } from './rotating-log.js';

/** What a client that does not read may have waiting for it, in bytes; beyond that it misses output. */
const MAX_BEHIND = 256 * 1024;
/** What may wait for a guest that does not read what clients type. */
const MAX_TYPED = 64 * 1024;
const MAX_PROMPT = 512;
const MISSED = '\r\n[tsvisor: output left out]\r\n';

/**
 * A guest's console, shared: all it says goes to a log and to every client, and what any of them types goes to the guest.
 * A client never makes the guest wait, nor grows this process.
 */
export class ConsoleHub {
  readonly #stream: Duplex;
  readonly #log: RotatingLog;
  readonly #clients = new Map<Socket, { behind: boolean }>();
  #line: Buffer = Buffer.alloc(0);

  /** @param stream the guest's console; another reader's pace is this one's too. */
  constructor(stream: Duplex, log: RotatingLog) {
    this.#stream = stream;
    this.#log = log;
    stream.on('data', (chunk: Buffer) => this.#say(chunk));
  }

  /** @param typed what the client sent already */
  join(client: Socket, typed: Buffer): void {
    this.#clients.set(client, { behind: false });
    client.write(this.#prompt());
    client.on('close', () => this.#clients.delete(client));
    client.on('end', () => client.end());
    client.on('data', (chunk: Buffer) => this.#type(client, chunk));
    if (typed.length > 0) this.#type(client, typed);
    client.resume();
  }

  #say(chunk: Buffer): void {
    this.#log.write(chunk);
    const start = chunk.lastIndexOf('\n') + 1;
    const line = start > 0 ? chunk.subarray(start) : Buffer.concat([this.#line, chunk]);
    this.#line = Buffer.from(line.subarray(-MAX_PROMPT));
    for (const [client, state] of this.#clients) {
      if (client.writableLength > MAX_BEHIND) state.behind = true;
      else {
        if (state.behind) client.write(MISSED);
        state.behind = false;
        client.write(chunk);
      }
    }
  }

  #type(client: Socket, chunk: Buffer): void {
    const stream = this.#stream;
    if (stream.destroyed || !stream.writable) return;
    stream.write(chunk);
    if (stream.writableLength <= MAX_TYPED) return;
    client.pause();
    stream.once('drain', () => client.resume());
  }

  /** The line that the guest is at, likely a prompt, as text alone: a terminal would answer a question in it again. */
  #prompt(): string {
    // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is left out
    return this.#line.toString('latin1').replace(/\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e]/g, '');
  }
}
