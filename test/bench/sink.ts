import { once } from 'node:events';
import { createServer, type Server } from 'node:net';
import type { Readable } from 'node:stream';

/** Reads streams to their ends, counts their bytes and discards them. */
export class Sink implements Disposable {
  /** Of the Unix socket: it is in no file system ("abstract"), and the kernel fills the name up with zeros. */
  readonly name = `tsvisor-bench-${process.pid}`;
  readonly #server: Server;
  #bytes = 0;
  readonly #ends: Promise<unknown>[] = [];

  private constructor() {
    this.#server = createServer((socket) => void this.read(socket));
  }

  static async open(): Promise<Sink> {
    const sink = new Sink();
    sink.#server.listen(`\0${sink.name}`);
    await once(sink.#server, 'listening');
    return sink;
  }

  /** @returns when the stream has ended. */
  read(stream: Readable): Promise<unknown> {
    stream.on('data', (chunk: Uint8Array) => {
      this.#bytes += chunk.length;
    });
    const end = once(stream, 'end');
    this.#ends.push(end);
    return end;
  }

  /** How many bytes have come so far, once all streams have ended. */
  async received(): Promise<number> {
    await Promise.all(this.#ends.splice(0));
    return this.#bytes;
  }

  [Symbol.dispose](): void {
    this.#server.close();
  }
}
