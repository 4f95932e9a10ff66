import { hkdfSync } from 'node:crypto';
import { chmodSync, rmSync } from 'node:fs';
import { type AddressInfo, createConnection } from 'node:net';
import { connect, createServer, type Server, type TLSSocket, type TlsOptions } from 'node:tls';
import { isMainThread } from 'node:worker_threads';
import { atExit } from '../at-exit.js';
import { removeStale } from '../backends/vsock/hybrid-socket.js';
import { MigrationError, UsageError } from '../errors.js';
import { type Address, formatAddress } from './address.js';

/** Bytes of a key at least. It is to be random: who listens in may try all keys that somebody could think of. */
const MIN_KEY = 16;
const IDENTITY = 'tsvisor';

/**
 * TLS 1.2 with a pre-shared key: with these cipher suites there are no certificates, and the handshake is over only when
 * each side has proved to the other that it has the key. The Diffie-Hellman exchange keeps what was said secret from
 * those who get the key later.
 */
const TLS = {
  minVersion: 'TLSv1.2',
  maxVersion: 'TLSv1.2',
  ciphers: 'DHE-PSK-AES256-GCM-SHA384:DHE-PSK-AES128-GCM-SHA256',
} as const satisfies TlsOptions;

/** Milliseconds that a visitor with another key has to hear of it. */
const GRACE = 1000;

/** What a record fails with that the other side has encrypted with another key, there and here. */
const WRONG_KEY = /BAD_RECORD_MAC|CIPHER_OPERATION_FAILED|DECRYPT/;

/** What the TLS key is derived from. @throws UsageError */
export function keyBytes(key: string | Uint8Array): Buffer {
  if (typeof key !== 'string' && !(key instanceof Uint8Array)) throw new UsageError('key: must be text or bytes');
  const bytes = Buffer.from(key as Uint8Array);
  if (bytes.length < MIN_KEY) {
    throw new UsageError(`key: ${bytes.length} bytes are too few; give ${MIN_KEY} or more that are random`);
  }
  return Buffer.from(hkdfSync('sha256', bytes, '', 'tsvisor migration', 32));
}

export function wrongKey(address: Address): MigrationError {
  return new MigrationError(`${formatAddress(address)}: the other side has another key; give both the same`);
}

/**
 * Connects to a target that has the key.
 * @throws MigrationError that names the address; its cause is the error of connect(2), when that failed.
 */
export function connectSecurely(address: Address, psk: Buffer, timeout: number): Promise<TLSSocket> {
  const where = formatAddress(address);
  return new Promise((resolve, reject) => {
    const raw = createConnection(
      address.kind === 'unix' ? { path: address.path } : { host: address.host, port: address.port },
    );
    let socket: TLSSocket | undefined;
    const fail = (error: MigrationError) => {
      clearTimeout(timer);
      socket?.destroy();
      raw.destroy();
      reject(error);
    };
    const timer = setTimeout(() => fail(new MigrationError(`${where}: no answer in ${timeout} ms`)), timeout);
    raw.on('error', (error: NodeJS.ErrnoException) => {
      if (socket) return; // it tells
      const why = isRefusal(error) ? 'nobody listens there; start the target first' : (error.code ?? error.message);
      fail(new MigrationError(`${where}: ${why}`, { cause: error }));
    });
    raw.on('connect', () => {
      raw.setKeepAlive(true, 5000);
      raw.setNoDelay(true);
      const secure = connect({
        ...TLS,
        socket: raw,
        checkServerIdentity: () => undefined, // the key tells
        pskCallback: () => ({ psk, identity: IDENTITY }),
      });
      socket = secure;
      const failed = (error: NodeJS.ErrnoException) => {
        if (WRONG_KEY.test(error.code ?? '')) fail(wrongKey(address));
        else
          fail(new MigrationError(`${where}: no secure connection (${error.code ?? error.message})`, { cause: error }));
      };
      const closed = () => fail(new MigrationError(`${where}: the connection was closed at once`));
      secure.once('error', failed).once('close', closed);
      secure.once('secureConnect', () => {
        clearTimeout(timer);
        secure.off('error', failed).off('close', closed);
        resolve(secure);
      });
    });
  });
}

/** Whether connect(2) found that nobody listens. */
export function isRefusal(error: unknown): boolean {
  const { code } = (error ?? {}) as NodeJS.ErrnoException;
  return code === 'ECONNREFUSED' || code === 'ENOENT';
}

export interface Visitors {
  /** Somebody who has the key. */
  connected(socket: TLSSocket): void;
  /** Somebody who has another key. */
  wrongKey(error: MigrationError): void;
}

/** Where a target listens, for those who have the key. */
export class SecureListener {
  /** With the real port. */
  readonly address: Address;
  readonly #server: Server;
  #forget = () => {};

  private constructor(address: Address, server: Server) {
    this.address = address;
    this.#server = server;
    if (address.kind === 'unix') this.#forget = atExit(() => rmSync(address.path, { force: true }));
  }

  /** @throws MigrationError that names the address. */
  static async open(address: Address, psk: Buffer, timeout: number, visitors: Visitors): Promise<SecureListener> {
    if (address.kind === 'unix') {
      await removeStale(address.path, (path, reason) => new MigrationError(`unix:${path}: cannot listen: ${reason}`));
    }
    const server = createServer({
      ...TLS,
      dhparam: 'auto',
      handshakeTimeout: timeout,
      pskCallback: (_socket, identity) => (identity === IDENTITY ? psk : null),
    } as TlsOptions);
    server.on('secureConnection', (socket) => {
      socket.setNoDelay(true);
      visitors.connected(socket);
    });
    server.on('connection', (socket) => socket.setKeepAlive(true, 5000));
    // Others, who do not even speak TLS, do not matter.
    server.on('tlsClientError', (error: NodeJS.ErrnoException, socket) => {
      const wrong = WRONG_KEY.test(error.code ?? '');
      setTimeout(() => socket.destroy(), wrong ? GRACE : 0); // it hears of it first
      if (wrong) visitors.wrongKey(wrongKey(address));
    });
    return new Promise((resolve, reject) => {
      server.once('error', (error: NodeJS.ErrnoException) => {
        const where = formatAddress(address);
        const why = error.code === 'EADDRINUSE' ? 'in use; end what listens there, or choose another' : error.code;
        reject(new MigrationError(`${where}: cannot listen: ${why ?? error.message}`, { cause: error }));
      });
      const listening = () => {
        server.on('error', () => {}); // of accept(2): the next one may succeed
        const real = server.address() as AddressInfo | string;
        if (typeof real === 'string') chmodSync(real, 0o600); // where the mask could not be set
        resolve(
          new SecureListener(
            address.kind === 'tcp' && typeof real !== 'string' ? { ...address, port: real.port } : address,
            server,
          ),
        );
      };
      if (address.kind === 'tcp') {
        server.listen({ host: address.host, port: address.port }, listening);
        return;
      }
      const mask = isMainThread ? process.umask(0o177) : undefined;
      try {
        server.listen(address.path, listening); // makes the path at once
      } finally {
        if (mask !== undefined) process.umask(mask);
      }
    });
  }

  /** It does not keep the process alive any more. */
  unref(): void {
    this.#server.unref();
  }

  /** Connections that are open stay so. */
  close(): void {
    this.#server.close();
    this.#forget();
  }
}
