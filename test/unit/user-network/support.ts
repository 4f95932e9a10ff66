import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net';
import { setTimeout } from 'node:timers/promises';

/** A TCP server of the host on loopback, for a test. */
export class HostServer implements AsyncDisposable {
  readonly #server: Server;
  readonly #sockets: Socket[] = [];
  #waiting: ((socket: Socket) => void)[] = [];
  #accepted: Socket[] = [];

  static async open(onSocket?: (socket: Socket) => void): Promise<HostServer> {
    const host = new HostServer(onSocket);
    host.#server.listen(0, '127.0.0.1');
    await once(host.#server, 'listening');
    return host;
  }

  private constructor(onSocket?: (socket: Socket) => void) {
    this.#server = createServer({ allowHalfOpen: true, pauseOnConnect: onSocket === undefined }, (socket) => {
      socket.on('error', () => {});
      this.#sockets.push(socket);
      if (onSocket) onSocket(socket);
      else {
        const waiter = this.#waiting.shift();
        if (waiter) waiter(socket);
        else this.#accepted.push(socket);
      }
    });
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  /** The next connection; it is paused. */
  next(): Promise<Socket> {
    const socket = this.#accepted.shift();
    return socket ? Promise.resolve(socket) : new Promise((resolve) => this.#waiting.push(resolve));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

/** All that a socket sends, until its end; it stays open for writing. */
export async function readAll(socket: Socket): Promise<Buffer> {
  const chunks: Buffer[] = [];
  socket.on('data', (chunk) => chunks.push(chunk)).resume();
  await once(socket, 'end');
  return Buffer.concat(chunks);
}

/** Bytes that are nowhere the same, so that a piece in the wrong place is seen. */
export function distinct(length: number): Buffer {
  return randomBytes(length);
}

/** Waits for something that no event tells of. The test's own timeout is the limit. */
export async function eventually(condition: () => boolean): Promise<void> {
  while (!condition()) await setTimeout(5);
}

/** Waits until a number has stopped changing, and returns it. */
export async function steady(value: () => number): Promise<number> {
  for (let last = value(), same = 0; ; ) {
    await setTimeout(20);
    same = value() === last ? same + 1 : 0;
    last = value();
    if (same === 10) return last;
  }
}
