import { createWriteStream, existsSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { dirname } from 'node:path';
import type { Duplex } from 'node:stream';
import { finished } from 'node:stream/promises';
import { TsvisorError, UsageError } from '../errors.js';

/** What a byte stream of the guest is connected to. */
export type Target =
  | { readonly kind: 'stdio' }
  | { readonly kind: 'none' }
  | { readonly kind: 'file' | 'socket'; readonly path: string };

/** A byte stream of the guest, as the command line asks for it. */
export interface StreamRequest {
  /** For error messages. */
  readonly option: string;
  readonly target: Target;
}

/** Bytes of a Unix socket's path (struct sockaddr_un); Node cuts longer ones. */
const MAX_SOCKET_PATH = 107;

/** The port that is the guest's hvc0. */
export const CONSOLE_PORT = 'hvc0';

/** Those of a machine. */
export interface StreamRequests {
  readonly serial: StreamRequest;
  readonly console: StreamRequest;
  readonly ports: readonly (StreamRequest & { readonly name: string })[];
}

export interface StreamOptions {
  readonly serial?: string | undefined;
  readonly console: string;
  readonly port: readonly string[];
}

/** Says what ttyS0, hvc0 and the named ports are connected to. @throws UsageError */
export function parseStreams(args: StreamOptions): StreamRequests {
  const console = parseTarget('--console', args.console, ['stdio', 'none', 'file', 'socket']);
  const serialDefault = console.kind === 'stdio' ? 'none' : 'stdio';
  const serial = parseTarget('--serial', args.serial ?? serialDefault, ['stdio', 'none', 'file']);
  if (console.kind === 'stdio' && serial.kind === 'stdio') {
    throw new UsageError('--serial: --console has stdio already; give --serial none or file:PATH');
  }
  const ports = args.port.map((text) => {
    const [, name, kind, path] = /^name=([^,]+),(file|socket)=(.+)$/.exec(text) ?? [];
    if (!name || !path) {
      throw new UsageError(`--port: '${text}' is not name=NAME,socket=PATH or name=NAME,file=PATH`);
    }
    return { name, option: `--port ${name}`, target: { kind: kind as 'file' | 'socket', path } };
  });
  return { serial: { option: '--serial', target: serial }, console: { option: '--console', target: console }, ports };
}

function parseTarget(option: string, text: string, kinds: readonly Target['kind'][]): Target {
  const [, kind, path] = /^(file|socket):(.+)$/.exec(text) ?? [];
  const target = path
    ? ({ kind, path } as Target)
    : text === 'stdio' || text === 'none'
      ? ({ kind: text } as Target)
      : undefined;
  if (target && kinds.includes(target.kind)) return target;
  const forms = kinds.map((kind) => (kind === 'file' || kind === 'socket' ? `${kind}:PATH` : kind));
  throw new UsageError(`${option}: '${text}' is not ${forms.slice(0, -1).join(', ')} or ${forms.at(-1)}`);
}

/** A stream of the guest that is connected to something of the host. */
export interface Connection {
  /** For when the machine has ended: resolves when all it said has got there. */
  done(): Promise<void>;
  /** Removes what was made for it. */
  close(): void;
}

/** Writes all that the guest says to a file. @param onError called at most once. */
export function connectFile(stream: Duplex, path: string, onError: (error: Error) => void): Connection {
  const file = createWriteStream(path);
  file.on('error', onError);
  stream.pipe(file);
  const written = finished(file).catch(() => {});
  return { done: () => written, close: () => {} };
}

/**
 * Listens on a Unix socket that only this user may connect to. One client at a time has the guest's stream; while there
 * is none the guest waits. A client that ends what it sends is taken to leave.
 * @throws TsvisorError ERR_OUTPUT
 */
export async function connectSocket(stream: Duplex, option: string, path: string): Promise<Connection> {
  let client: Socket | undefined;
  const server = createServer((socket) => {
    client = socket;
    socket.on('error', () => {}); // it left in a hurry
    socket.on('end', () => stream.unpipe(socket));
    socket.on('close', () => {
      stream.unpipe(socket);
      socket.unpipe(stream);
      client = undefined;
    });
    socket.pipe(stream, { end: false });
    stream.pipe(socket);
  });
  server.maxConnections = 1;
  await listen(server, option, path);
  const remove = () => rmSync(path, { force: true });
  process.once('exit', remove);
  return {
    done: async () => {
      if (client) await finished(client, { readable: false }).catch(() => {});
    },
    close: () => {
      process.removeListener('exit', remove);
      client?.destroy();
      server.close(); // removes the path
    },
  };
}

function listen(server: Server, option: string, path: string): Promise<void> {
  const wrong = (reason: string, cause?: Error) =>
    new TsvisorError('ERR_OUTPUT', `${option}: cannot make the socket ${path}: ${reason}`, { cause });
  if (Buffer.byteLength(path) > MAX_SOCKET_PATH) throw wrong(`its path is longer than ${MAX_SOCKET_PATH} bytes`);
  return new Promise((resolve, reject) => {
    server.on('error', (error: NodeJS.ErrnoException) => {
      let reason = error.code ?? error.message;
      if (error.code === 'EADDRINUSE') reason = 'there is something of that name';
      else if (!existsSync(dirname(path))) reason = `there is no folder ${dirname(path)}`; // Node says EACCES
      reject(wrong(reason, error));
    });
    const mask = process.umask(0o177);
    try {
      server.listen(path, resolve); // makes the path at once
    } finally {
      process.umask(mask);
    }
  });
}
