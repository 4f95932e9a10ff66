import { randomInt } from 'node:crypto';
import type { Duplex } from 'node:stream';
import { UsageError, VsockError } from '../../errors.js';
import {
  VIRTIO_VSOCK_OP_REQUEST as REQUEST,
  VIRTIO_VSOCK_OP_RESPONSE as RESPONSE,
  VIRTIO_VSOCK_OP_RST as RST,
  VIRTIO_VSOCK_TYPE_STREAM as STREAM,
} from '../../virtio/generated/virtio.js';
import { Connection, type ConnectionOwner, connectionKey } from './connection.js';
import { HybridSocket, joinStreams } from './hybrid-socket.js';
import { VsockLink } from './link.js';
import { VsockListener } from './listener.js';
import { ANY_PORT, type PacketHeader } from './packet.js';
import type { VsockStream } from './stream.js';
import type { Vsock, VsockConnectOptions } from './vsock.js';

/** Connections of a machine at a time; those whose stream is not destroyed yet count. */
const MAX_CONNECTIONS = 1024;
/** Bytes that each may have waiting for its reader: the first connections, and those above LARGE_BUFFERS. */
const LARGE_BUFFER = 256 * 1024;
const SMALL_BUFFER = 64 * 1024;
const LARGE_BUFFERS = 128;
/** Ports of connections that the host makes, where nobody listens. */
const FIRST_PORT = 2 ** 30;
const PORTS = 2 ** 31;
const DEFAULT_TIMEOUT = 10_000;

export interface VsockOptions {
  /** The guest's address. */
  readonly cid: number;
  /** Path of a Unix socket to make, for other processes. */
  readonly socket?: string | undefined;
  /** Told of what the guest did wrong, as often as it does. */
  readonly warn: (message: string) => void;
}

/** The host's side of a machine's vsock: its connections, whose packets go to and from the device by a VsockLink. */
export class VsockHost implements Vsock {
  readonly cid: number;
  readonly #warn: (message: string) => void;
  readonly #owner: ConnectionOwner;
  /** By connectionKey(): those that the guest may know of. */
  readonly #connections = new Map<string, Connection>();
  /** What the next packet of one that is not established yet leads to. */
  readonly #opening = new Map<Connection, (header: PacketHeader) => void>();
  readonly #listeners = new Map<number, VsockListener>();
  /** Those that have data to send when the link has room. */
  readonly #awaitingLink = new Set<Connection>();
  #hybrid: HybridSocket | undefined;
  #link: VsockLink | undefined;
  /** Streams that are not destroyed. */
  #streams = 0;
  /** By chance: in a guest that goes on from a snapshot there may be sockets yet that refuse what comes from a port of before. */
  #nextPort = FIRST_PORT + randomInt(PORTS);
  #driver = false;
  #onDriverUp: (() => void)[] = [];
  /** No packet will come any more. */
  #unlinked = true;
  #end: Error | undefined;

  private constructor({ cid, warn }: VsockOptions) {
    this.cid = cid;
    this.#warn = warn;
    this.#owner = {
      awaitLink: (connection) => this.#awaitingLink.add(connection),
      closed: (connection) => {
        this.#connections.delete(connection.key);
        this.#opening.delete(connection);
        this.#awaitingLink.delete(connection);
      },
      warn,
    };
  }

  /** @throws TsvisorError ERR_OUTPUT when the Unix socket cannot be made. */
  static async open(options: VsockOptions): Promise<VsockHost> {
    const vsock = new VsockHost(options);
    if (options.socket !== undefined) {
      vsock.#hybrid = await HybridSocket.open(options.socket, (port) => vsock.connect(port));
    }
    return vsock;
  }

  /** Connects it to its device. @param stream the other end of a VsockChannel. */
  attach(stream: Duplex): void {
    this.#unlinked = false;
    this.#link = new VsockLink(this.cid, stream, {
      packet: (header, payload) => this.#receive(header, payload),
      driver: (up) => {
        this.#driver = up;
        this.#abortAll(new VsockError('vsock: the guest was reset'));
        if (up) for (const resolve of this.#onDriverUp.splice(0)) resolve();
      },
      closed: () => {
        this.#unlinked = true;
        if (this.#end) this.#abortAll(this.#end);
      },
      drained: () => {
        const waiting = [...this.#awaitingLink];
        this.#awaitingLink.clear();
        for (const connection of waiting) connection.pump();
      },
    });
  }

  /** Resolves once the guest's driver runs. */
  driverUp(): Promise<void> {
    return this.#driver ? Promise.resolve() : new Promise((resolve) => this.#onDriverUp.push(resolve));
  }

  async connect(port: number, options: VsockConnectOptions = {}): Promise<VsockStream> {
    const { signal, timeout = DEFAULT_TIMEOUT } = options;
    checkPort(port);
    if (!(timeout >= 1 && timeout < 2 ** 31)) throw new UsageError(`timeout: ${timeout} is not 1 to 2^31 - 1 ms`);
    signal?.throwIfAborted();
    if (this.#end) throw this.#end;
    const failed = (why: string) => new VsockError(`vsock: port ${port} of the guest: ${why}`);
    if (!this.#driver) throw failed('the guest has no vsock driver running (yet)');
    if (this.#full) throw failed(`there are ${MAX_CONNECTIONS} connections already`);
    const connection = this.#open(this.#choosePort(port), port);
    const { stream } = connection;
    const established = new Promise<VsockStream>((resolve, reject) => {
      stream.once('close', () => reject(stream.errored));
      this.#opening.set(connection, (header) => {
        if (header.op === RST) connection.close(failed('connection refused'));
        else if (header.op !== RESPONSE) connection.violated(`operation ${header.op} instead of an answer`);
        else if (connection.establish(header)) {
          this.#opening.delete(connection);
          resolve(stream);
        }
      });
    });
    const timer = setTimeout(() => stream.destroy(failed(`no answer in ${timeout} ms`)), timeout);
    const abort = () => stream.destroy(signal?.reason);
    signal?.addEventListener('abort', abort);
    connection.send(REQUEST);
    try {
      return await established;
    } catch (error) {
      throw signal?.aborted ? signal.reason : error; // a reason may be anything
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', abort);
    }
  }

  listen(port: number): VsockListener {
    checkPort(port);
    if (this.#end) throw this.#end;
    if (this.#listeners.has(port)) throw new UsageError(`vsock: port ${port} of the host has a listener already`);
    const listener = new VsockListener(port, () => this.#listeners.delete(port));
    this.#listeners.set(port, listener);
    return listener;
  }

  /**
   * The machine has ended: ends listeners and the Unix socket now, and destroys every stream with that error once all
   * that the guest has sent was read.
   */
  close(error: Error): void {
    if (this.#end) return;
    this.#end = error;
    this.#hybrid?.close();
    if (this.#unlinked) this.#abortAll(error);
    for (const listener of [...this.#listeners.values()]) void listener.close();
  }

  get #full(): boolean {
    return Math.max(this.#connections.size, this.#streams) >= MAX_CONNECTIONS;
  }

  #open(localPort: number, remotePort: number): Connection {
    const buffer = this.#streams < LARGE_BUFFERS ? LARGE_BUFFER : SMALL_BUFFER;
    const link = this.#link as VsockLink; // it told of a driver, or of a packet
    const connection = new Connection(link, this.#owner, localPort, remotePort, buffer);
    this.#connections.set(connection.key, connection);
    this.#streams++;
    connection.stream.once('close', () => this.#streams--);
    return connection;
  }

  #choosePort(remotePort: number): number {
    for (;;) {
      const port = this.#nextPort;
      this.#nextPort = FIRST_PORT + ((port + 1 - FIRST_PORT) % PORTS);
      if (!this.#listeners.has(port) && !this.#connections.has(connectionKey(port, remotePort))) return port;
    }
  }

  #abortAll(error: Error): void {
    for (const connection of [...this.#connections.values()]) connection.close(error);
  }

  #receive(header: PacketHeader, payload: Uint8Array): void {
    const { srcPort, dstPort, type, op } = header;
    const connection = this.#connections.get(connectionKey(dstPort, srcPort));
    if (type !== STREAM) {
      this.#reject(header); // section 5.10.6.4.2
    } else if (!connection) {
      if (op === REQUEST) this.#accept(header);
      else this.#reject(header);
    } else if (this.#opening.has(connection)) {
      this.#opening.get(connection)?.(header);
    } else {
      connection.receive(header, payload);
    }
  }

  /** Answers a packet that belongs to nothing. */
  #reject({ srcPort, dstPort, type, op }: PacketHeader): void {
    if (op === RST) return;
    this.#link?.send({ srcPort: dstPort, dstPort: srcPort, type, op: RST, flags: 0, bufAlloc: 0, fwdCnt: 0 });
  }

  #accept(header: PacketHeader): void {
    const { dstPort: localPort, srcPort: remotePort } = header;
    const listener = this.#listeners.get(localPort);
    const full = this.#full || listener?.full;
    if (full) this.#warn(`vsock: too many connections of the guest to port ${localPort} of the host; one is refused`);
    if (full || (!listener && !this.#hybrid)) {
      this.#reject(header);
      return;
    }
    const connection = this.#open(localPort, remotePort);
    if (!connection.establish(header)) return;
    if (listener) {
      connection.send(RESPONSE);
      listener.add(connection.stream);
    } else {
      void this.#forward(connection);
    }
  }

  /** Connects a connection of the guest to the Unix socket for its port. */
  async #forward(connection: Connection): Promise<void> {
    const { stream } = connection;
    this.#opening.set(connection, ({ op }) => {
      if (op === RST) connection.close(new VsockError('vsock: the guest did not wait for a connection'));
      else connection.violated(`operation ${op} before an answer`);
    });
    try {
      const socket = await (this.#hybrid as HybridSocket).connect(connection.localPort);
      joinStreams(socket, stream);
      if (stream.destroyed) return;
      this.#opening.delete(connection);
      connection.send(RESPONSE);
    } catch {
      stream.destroy(); // refuses it
    }
  }
}

function checkPort(port: number): void {
  if (Number.isInteger(port) && port >= 0 && port < ANY_PORT) return;
  throw new UsageError(`vsock: port ${port} is not a number from 0 to 2^32 - 2`);
}
