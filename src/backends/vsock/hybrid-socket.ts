import { chmodSync, existsSync, lstatSync, rmSync } from 'node:fs';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import { dirname } from 'node:path';
import { type Duplex, pipeline } from 'node:stream';
import { isMainThread } from 'node:worker_threads';
import { atExit } from '../../at-exit.js';
import { TsvisorError } from '../../errors.js';

/** Bytes of a Unix socket's path (struct sockaddr_un); Node cuts longer ones. */
const MAX_SOCKET_PATH = 107;
/** The longest request is `CONNECT 4294967294\n`. */
const MAX_REQUEST = 32;
/** Milliseconds that a client may take to say where it wants to. */
const REQUEST_TIMEOUT = 5000;
const NEWLINE = 0x0a;

/**
 * vsock for other processes, by Unix sockets as Firecracker's: a client sends `CONNECT <port>\n`, is answered
 * `OK <port of the host>\n` and is then connected to that port of the guest, or disconnected. Connections of the guest
 * to port P of the host go to the Unix socket at the same path with `_P` after it. Only this user may connect.
 */
export class HybridSocket {
  readonly #path: string;
  readonly #server: Server;
  /** Those that are not connected to the guest yet; the others end with their connection. */
  readonly #clients = new Set<Socket>();
  readonly #remove = () => rmSync(this.#path, { force: true });
  #forget = () => {};

  private constructor(path: string, connect: (port: number) => Promise<Duplex & { localPort: number }>) {
    this.#path = path;
    this.#server = createServer({ allowHalfOpen: true }, (client) => {
      this.#clients.add(client);
      client.on('error', () => {}); // it left in a hurry
      client.on('close', () => this.#clients.delete(client));
      void serve(client, connect).then(() => this.#clients.delete(client));
    });
  }

  /** Makes the socket. One that a dead process left is replaced. @throws TsvisorError ERR_OUTPUT */
  static async open(
    path: string,
    connect: (port: number) => Promise<Duplex & { localPort: number }>,
  ): Promise<HybridSocket> {
    const socket = new HybridSocket(path, connect);
    await removeStale(path, cannotMake);
    await socket.#listen();
    return socket;
  }

  /** Connects to who listens for the guest's connections to a port. Rejects when nobody does. */
  connect(port: number): Promise<Duplex> {
    return connectTo(`${this.#path}_${port}`);
  }

  /** Removes the socket; who is connected to the guest stays so. */
  close(): void {
    this.#forget();
    this.#server.close();
    this.#remove();
    for (const client of this.#clients) client.destroy();
  }

  #listen(): Promise<void> {
    const path = this.#path;
    return new Promise((resolve, reject) => {
      this.#server.on('error', (error: NodeJS.ErrnoException) => {
        // Node says EACCES for a folder that is missing.
        const reason = existsSync(dirname(path))
          ? (error.code ?? error.message)
          : `there is no folder ${dirname(path)}`;
        reject(cannotMake(path, reason, error));
      });
      // A Worker may not set the mask; there the mode is right a moment later.
      const mask = isMainThread ? process.umask(0o177) : undefined;
      try {
        this.#server.listen(path, () => {
          this.#forget = atExit(this.#remove);
          resolve();
        }); // makes the path at once
      } finally {
        if (mask !== undefined) process.umask(mask);
      }
      if (this.#server.listening) chmodSync(path, 0o600);
    });
  }
}

/** Carries bytes both ways, and each end by itself. When one fails the other is destroyed. */
export function joinStreams(a: Duplex, b: Duplex): void {
  pipeline(a, b, () => {});
  pipeline(b, a, () => {});
}

async function serve(client: Socket, connect: (port: number) => Promise<Duplex & { localPort: number }>) {
  const timer = setTimeout(() => client.destroy(), REQUEST_TIMEOUT);
  const request = await readLine(client);
  clearTimeout(timer);
  const port = /^CONNECT (\d{1,10})$/.exec(request ?? '')?.[1];
  try {
    if (port === undefined) throw new Error('no request');
    const stream = await connect(Number(port));
    if (!client.destroyed) client.write(`OK ${stream.localPort}\n`);
    joinStreams(client, stream);
  } catch {
    client.destroy();
  }
}

/** The bytes up to a newline, which is taken too; undefined when there is none. What follows stays in the stream. */
function readLine(client: Socket): Promise<string | undefined> {
  return new Promise((resolve) => {
    let line = Buffer.alloc(0);
    const finish = (result: string | undefined) => {
      client.off('readable', read).off('end', none).off('close', none);
      resolve(result);
    };
    const none = () => finish(undefined);
    const read = () => {
      for (let chunk: Buffer | null = client.read(); chunk; chunk = client.read()) {
        line = Buffer.concat([line, chunk]);
        const end = line.subarray(0, MAX_REQUEST).indexOf(NEWLINE);
        if (end >= 0) {
          const rest = line.subarray(end + 1);
          if (rest.length > 0) client.unshift(rest);
          return finish(line.toString('latin1', 0, end));
        }
        if (line.length >= MAX_REQUEST) return none();
      }
    };
    client.on('readable', read).on('end', none).on('close', none);
  });
}

/** Removes a socket that a dead process left. @param failed makes the error when there is anything else. */
export async function removeStale(path: string, failed: (path: string, reason: string) => Error): Promise<void> {
  if (Buffer.byteLength(path) > MAX_SOCKET_PATH) {
    throw failed(path, `its path is longer than ${MAX_SOCKET_PATH} bytes`);
  }
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (!found) return;
  if (!found.isSocket()) throw failed(path, 'there is a file of that name');
  try {
    (await connectTo(path)).destroy();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ECONNREFUSED') throw failed(path, String(error));
    rmSync(path, { force: true });
    return;
  }
  throw failed(path, 'another process listens on it');
}

function connectTo(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    if (Buffer.byteLength(path) > MAX_SOCKET_PATH) throw new Error(`${path} is too long for a socket`);
    const socket = createConnection({ path, allowHalfOpen: true });
    socket.once('error', reject);
    socket.once('connect', () => {
      socket.off('error', reject);
      socket.on('error', () => {});
      resolve(socket);
    });
  });
}

function cannotMake(path: string, reason: string, cause?: Error): TsvisorError {
  return new TsvisorError('ERR_OUTPUT', `vsock.socket: cannot make ${path}: ${reason}`, { cause });
}
