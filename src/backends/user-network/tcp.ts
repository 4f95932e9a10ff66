import { connect } from 'node:net';
import type { Duplex } from 'node:stream';
import { DNS_SERVER, formatAddress, GATEWAY, hostAddressOf, inNetwork } from './addresses.js';
import { put16, put32 } from './bytes.js';
import type { Counters } from './counters.js';
import { DNS_PORT } from './dns.js';
import type { Policy } from './flow.js';
import { type Icmp, Unreachable } from './icmp.js';
import { type Ipv4Output, type Packet, Protocol } from './ipv4.js';
import type { Link } from './link.js';
import { State, TcpConnection, type TcpContext } from './tcp-connection.js';
import { TcpMemory } from './tcp-memory.js';
import { type Endpoints, Flag, parseTcp, type Segment, sequenceDifference, TcpOutput } from './tcp-segments.js';
import type { Tuning } from './tuning.js';

/** Source ports of connections from host forwards. */
const FIRST_EPHEMERAL = 49152;
const EPHEMERALS = 65536 - FIRST_EPHEMERAL;
/** Connections that may go on when memory becomes free: few at a time, since each may take much. */
const WAKE_AT_ONCE = 16;

export interface TcpParts {
  readonly tuning: Tuning;
  readonly counters: Counters;
  readonly link: Link;
  readonly ip: Ipv4Output;
  readonly icmp: Icmp;
  readonly policy: Policy;
  /** A stream to the DNS server. */
  readonly openDns: () => Duplex;
}

/** All TCP connections of the guest. */
export class Tcp implements TcpContext {
  readonly tuning: Tuning;
  readonly counters: Counters;
  readonly memory: TcpMemory;
  readonly link: Link;
  readonly output: TcpOutput;
  readonly #icmp: Icmp;
  readonly #policy: Policy;
  readonly #openDns: () => Duplex;
  readonly #all = new Set<TcpConnection>();
  /** By guest address and port, then by the other end's: those that segments of the guest can belong to. */
  readonly #table = new Map<number, Map<number, TcpConnection>>();
  readonly #timeWait = new Set<TcpConnection>();
  #halfOpen = 0;
  readonly #streams = new Set<Duplex>();
  #scheduled = new Set<TcpConnection>();
  #flushing = new Set<TcpConnection>();
  #immediate: NodeJS.Immediate | undefined;
  readonly #waitingForLink = new Set<TcpConnection>();
  readonly #waitingForMemory = new Set<TcpConnection>();
  #nextEphemeral = 0;

  constructor(parts: TcpParts) {
    this.tuning = parts.tuning;
    this.counters = parts.counters;
    this.link = parts.link;
    this.#icmp = parts.icmp;
    this.#policy = parts.policy;
    this.#openDns = parts.openDns;
    this.output = new TcpOutput(parts.link, parts.ip);
    this.memory = new TcpMemory(parts.counters, parts.tuning.totalBuffer);
    this.memory.onRoom = () => {
      let woken = 0;
      for (const connection of this.#waitingForMemory) {
        if (woken++ === WAKE_AT_ONCE) return;
        this.#waitingForMemory.delete(connection);
        this.schedule(connection);
      }
    };
  }

  // ---- Segments

  input(packet: Packet): void {
    const segment = parseTcp(packet, this.counters);
    if (!segment) return;
    const found = this.#find(segment);
    const opens = segment.has(Flag.SYN) && !segment.has(Flag.ACK | Flag.RST);
    if (found?.state === State.TIME_WAIT && opens && sequenceDifference(segment.sequence, found.expected) > 0) {
      found.linger(); // the ports are used again
    } else if (found) {
      found.input(segment);
      return;
    }
    if (opens) this.#accept(segment);
    else if (!segment.has(Flag.RST)) this.#refuse(segment);
  }

  #find(segment: Segment): TcpConnection | undefined {
    const byRemote = this.#table.get((segment.source & 255) * 65536 + segment.sourcePort);
    return byRemote?.get(segment.destination * 65536 + segment.destinationPort);
  }

  /** The answer to a segment of no connection (RFC 9293 section 3.10.7.1). */
  #refuse(segment: Segment): void {
    const to = endpointsOf(segment);
    if (segment.has(Flag.ACK)) {
      this.output.send(to, Flag.RST, segment.acknowledgement, 0, 0);
      return;
    }
    const length = segment.end - segment.start + (segment.has(Flag.SYN) ? 1 : 0) + (segment.has(Flag.FIN) ? 1 : 0);
    this.output.send(to, Flag.RST | Flag.ACK, 0, (segment.sequence + length) >>> 0, 0);
  }

  // ---- Connections of the guest

  #accept(syn: Segment): void {
    if (this.#halfOpen >= this.tuning.halfOpen) {
      this.counters.dropped.limit++; // the guest tries again
      return;
    }
    if (!this.#hasRoom()) {
      this.#refuse(syn);
      return;
    }
    const connection = this.#add(endpointsOf(syn), State.CONNECTING);
    connection.accept(syn);
    const { remoteAddress, remotePort } = connection;
    if (remoteAddress === DNS_SERVER) {
      this.#connectDns(connection);
      return;
    }
    if (inNetwork(remoteAddress) && remoteAddress !== GATEWAY) {
      this.#fail(connection, 'EHOSTUNREACH');
      return;
    }
    this.#policy.decide(
      () => ({ protocol: 'tcp', address: formatAddress(remoteAddress), port: remotePort }),
      (allowed) => {
        if (connection.state !== State.CONNECTING) return;
        if (allowed) this.#connect(connection);
        else this.#fail(connection, 'ECONNREFUSED');
      },
    );
  }

  #hasRoom(): boolean {
    if (this.#all.size >= this.tuning.connections) {
      for (const oldest of this.#timeWait) {
        oldest.linger();
        break;
      }
    }
    if (this.#all.size < this.tuning.connections) return true;
    this.counters.dropped.limit++;
    return false;
  }

  #connectDns(connection: TcpConnection): void {
    if (connection.remotePort !== DNS_PORT) {
      this.#fail(connection, 'ECONNREFUSED');
      return;
    }
    this.#attach(connection, this.#openDns());
    connection.connected();
  }

  #connect(connection: TcpConnection): void {
    const host = formatAddress(hostAddressOf(connection.remoteAddress));
    const socket = connect({ host, port: connection.remotePort, allowHalfOpen: true, noDelay: true });
    socket.on('error', (error: NodeJS.ErrnoException) => this.#fail(connection, error.code));
    this.#attach(connection, socket);
    socket.on('connect', () => connection.connected());
  }

  #attach(connection: TcpConnection, stream: Duplex): void {
    this.#streams.add(stream);
    stream.on('close', () => this.#streams.delete(stream));
    connection.attach(stream);
  }

  /** The host side could not be connected: the guest gets the same error. */
  #fail(connection: TcpConnection, code: string | undefined): void {
    if (connection.state !== State.CONNECTING) return;
    this.counters.tcpFailed++;
    const unreachable = UNREACHABLE[code ?? ''];
    if (unreachable === undefined) this.output.send(connection, Flag.RST | Flag.ACK, 0, connection.expected, 0);
    else {
      const { guestAddress, guestPort, remoteAddress, remotePort } = connection;
      const start = new Uint8Array(8);
      put16(start, 0, guestPort);
      put16(start, 2, remotePort);
      put32(start, 4, connection.guestInitialSequence);
      this.#icmp.unreachable(unreachable, guestAddress, remoteAddress, Protocol.TCP, start);
    }
    connection.abort(false);
  }

  // ---- Connections to the guest

  /** Opens a connection to the guest for a stream of the host; the stream is destroyed when that fails. */
  open(stream: Duplex, guestAddress: number, guestPort: number): void {
    const byRemote = this.#table.get((guestAddress & 255) * 65536 + guestPort);
    if (!this.#hasRoom() || (byRemote?.size ?? 0) >= EPHEMERALS / 2) {
      stream.destroy();
      return;
    }
    let remotePort: number;
    do {
      remotePort = FIRST_EPHEMERAL + this.#nextEphemeral;
      this.#nextEphemeral = (this.#nextEphemeral + 1) % EPHEMERALS;
    } while (byRemote?.has(GATEWAY * 65536 + remotePort));
    const endpoints = { guestAddress, guestPort, remoteAddress: GATEWAY, remotePort };
    const connection = this.#add(endpoints, State.SYN_SENT);
    this.#attach(connection, stream);
    connection.open();
  }

  // ---- What connections ask for

  schedule(connection: TcpConnection): void {
    this.#scheduled.add(connection);
    this.#immediate ??= setImmediate(() => this.#flush());
  }

  #flush(): void {
    this.#immediate = undefined;
    const ready = this.#scheduled;
    this.#scheduled = this.#flushing;
    this.#flushing = ready;
    this.link.batch(() => {
      for (const connection of ready) connection.flush();
    });
    ready.clear();
  }

  waitForLink(connection: TcpConnection): void {
    this.#waitingForLink.add(connection);
  }

  waitForMemory(connection: TcpConnection): void {
    this.#waitingForMemory.add(connection);
  }

  /** The link takes data again. */
  drained(): void {
    for (const connection of this.#waitingForLink) this.schedule(connection);
    this.#waitingForLink.clear();
  }

  // ---- The table

  #add(endpoints: Endpoints, state: 0 | 2): TcpConnection {
    const connection = new TcpConnection(this, endpoints, state);
    const key = (endpoints.guestAddress & 255) * 65536 + endpoints.guestPort;
    let byRemote = this.#table.get(key);
    if (!byRemote) {
      byRemote = new Map();
      this.#table.set(key, byRemote);
    }
    byRemote.set(endpoints.remoteAddress * 65536 + endpoints.remotePort, connection);
    this.#all.add(connection);
    this.counters.tcpNow = this.#all.size;
    if (isHalfOpen(state)) this.#halfOpen++;
    return connection;
  }

  stateChanged(connection: TcpConnection, from: State): void {
    const { state } = connection;
    if (isHalfOpen(from) && !isHalfOpen(state)) this.#halfOpen--;
    if (state === State.TIME_WAIT) this.#timeWait.add(connection);
    else this.#timeWait.delete(connection);
    if (state < State.LINGERING) return;
    this.#untable(connection);
    this.#waitingForLink.delete(connection);
    if (state !== State.CLOSED) return;
    this.#waitingForMemory.delete(connection);
    this.#scheduled.delete(connection);
    this.#all.delete(connection);
    this.counters.tcpNow = this.#all.size;
  }

  #untable(connection: TcpConnection): void {
    const key = (connection.guestAddress & 255) * 65536 + connection.guestPort;
    const byRemote = this.#table.get(key);
    const remote = connection.remoteAddress * 65536 + connection.remotePort;
    if (byRemote?.get(remote) !== connection) return;
    byRemote.delete(remote);
    if (byRemote.size === 0) this.#table.delete(key);
  }

  sweep(now: number): void {
    for (const connection of this.#all) connection.sweep(now);
    if (this.memory.free > 0) this.memory.onRoom();
  }

  /** Ends all connections, without a word to the guest. */
  clear(): void {
    for (const connection of [...this.#all]) connection.abort(false);
  }

  async close(): Promise<void> {
    this.clear();
    clearImmediate(this.#immediate);
    this.#immediate = undefined;
    await Promise.all([...this.#streams].map((stream) => new Promise((resolve) => stream.once('close', resolve))));
  }
}

function isHalfOpen(state: State): boolean {
  return state === State.CONNECTING || state === State.SYN_RECEIVED;
}

function endpointsOf(segment: Segment): Endpoints {
  return {
    guestAddress: segment.source,
    guestPort: segment.sourcePort,
    remoteAddress: segment.destination,
    remotePort: segment.destinationPort,
  };
}

/** Errors of connect(2) for which the guest gets ICMP and not a reset. */
const UNREACHABLE: Readonly<Record<string, number>> = {
  ENETUNREACH: Unreachable.NET,
  EHOSTUNREACH: Unreachable.HOST,
  ETIMEDOUT: Unreachable.HOST,
  EACCES: Unreachable.PROHIBITED,
  EPERM: Unreachable.PROHIBITED,
};
