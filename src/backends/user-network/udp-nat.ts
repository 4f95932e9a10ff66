import type { RemoteInfo, Socket } from 'node:dgram';
import { formatAddress, guestViewOf, hostAddressOf, parseAddress } from './addresses.js';
import type { Counters } from './counters.js';
import type { Policy } from './flow.js';
import type { Tuning } from './tuning.js';
import type { Datagram, UdpOutput } from './udp.js';
import { closeSocket, udpSocket } from './udp-socket.js';

/** Datagrams that host sockets have not sent yet, of all mappings; each may hold a buffer of 64 KiB. */
const MAX_SENDING = 1024;

interface FlowState {
  /** undefined while `allow` thinks. */
  allowed: boolean | undefined;
  readonly address: number;
  readonly port: number;
  readonly pending: Uint8Array[];
}

/**
 * One guest address and port: one host socket for all peers (endpoint-independent mapping, RFC 4787), which accepts
 * datagrams from the addresses that the guest has sent to (address-dependent filtering).
 */
class Mapping {
  readonly address: number;
  readonly port: number;
  socket: Socket | undefined;
  /** Datagrams that the socket has not sent yet. */
  sending = 0;
  lastUsed = 0;
  /** By address and port; oldest first. */
  readonly flows = new Map<number, FlowState>();
  /** How many allowed flows an address has. */
  readonly peers = new Map<number, number>();

  constructor(address: number, port: number) {
    this.address = address;
    this.port = port;
  }
}

/** The guest's UDP to the outside. */
export class UdpNat {
  readonly #counters: Counters;
  readonly #tuning: Tuning;
  readonly #policy: Policy;
  readonly #output: UdpOutput;
  /** By guest address and port; the least recently used first. */
  readonly #mappings = new Map<number, Mapping>();
  readonly #closing = new Set<Promise<void>>();
  #sending = 0;
  #pendingBytes = 0;

  constructor(counters: Counters, tuning: Tuning, policy: Policy, output: UdpOutput) {
    this.#counters = counters;
    this.#tuning = tuning;
    this.#policy = policy;
    this.#output = output;
  }

  /** A datagram of the guest to a routable address. */
  input(datagram: Datagram): void {
    const mapping = this.#mappingOf(datagram.source, datagram.sourcePort);
    const { destination: address, destinationPort: port, payload } = datagram;
    const key = address * 65536 + port;
    let flow = mapping.flows.get(key);
    if (!flow) {
      if (mapping.flows.size >= this.#tuning.udpFlows) this.#forgetFlow(mapping);
      flow = { allowed: undefined, address, port, pending: [] };
      mapping.flows.set(key, flow);
      this.#decide(mapping, flow, key);
    }
    if (flow.allowed) this.#send(mapping, flow, payload);
    else if (flow.allowed === undefined) this.#hold(flow, payload);
  }

  #mappingOf(address: number, port: number): Mapping {
    const key = (address & 255) * 65536 + port;
    let mapping = this.#mappings.get(key);
    if (mapping) this.#mappings.delete(key);
    else {
      const oldest = this.#mappings.values().next().value;
      if (oldest && this.#mappings.size >= this.#tuning.udpMappings) this.#remove(oldest);
      mapping = new Mapping(address, port);
    }
    this.#mappings.set(key, mapping);
    this.#counters.udpMappingsNow = this.#mappings.size;
    mapping.lastUsed = performance.now();
    return mapping;
  }

  #decide(mapping: Mapping, flow: FlowState, key: number): void {
    const describe = () => ({ protocol: 'udp', address: formatAddress(flow.address), port: flow.port }) as const;
    this.#policy.decide(describe, (allowed) => {
      if (mapping.flows.get(key) !== flow) return; // forgotten meanwhile
      flow.allowed = allowed;
      if (allowed) {
        mapping.peers.set(flow.address, (mapping.peers.get(flow.address) ?? 0) + 1);
        for (const payload of flow.pending) this.#send(mapping, flow, payload);
      }
      this.#release(flow);
    });
  }

  #hold(flow: FlowState, payload: Uint8Array): void {
    if (this.#pendingBytes + payload.length + 64 > this.#tuning.udpPending) {
      this.#counters.dropped.limit++;
      return;
    }
    this.#pendingBytes += payload.length + 64; // an empty one costs too
    flow.pending.push(Uint8Array.from(payload));
  }

  #release(flow: FlowState): void {
    for (const payload of flow.pending) this.#pendingBytes -= payload.length + 64;
    flow.pending.length = 0;
  }

  #forgetFlow(mapping: Mapping): void {
    for (const [key, flow] of mapping.flows) {
      mapping.flows.delete(key);
      this.#release(flow);
      if (!flow.allowed) return;
      const others = (mapping.peers.get(flow.address) as number) - 1;
      if (others > 0) mapping.peers.set(flow.address, others);
      else mapping.peers.delete(flow.address);
      return;
    }
  }

  #send(mapping: Mapping, flow: FlowState, payload: Uint8Array): void {
    if (this.#sending >= MAX_SENDING) {
      this.#counters.dropped.limit++;
      return;
    }
    mapping.socket ??= this.#open(mapping);
    this.#sending++;
    mapping.sending++;
    this.#counters.udpToHost++;
    mapping.socket.send(payload, flow.port, formatAddress(hostAddressOf(flow.address)), (error) => {
      if (error) this.#counters.hostErrors++;
      if (mapping.sending === 0) return; // it was removed
      mapping.sending--;
      this.#sending--;
    });
  }

  #open(mapping: Mapping): Socket {
    const socket = udpSocket();
    socket.on('message', (payload, from) => this.#reply(mapping, payload, from));
    socket.on('error', () => {
      this.#counters.hostErrors++;
      if (mapping.socket === socket) this.#remove(mapping);
    });
    socket.bind({ address: '0.0.0.0', port: 0, exclusive: true });
    return socket;
  }

  #reply(mapping: Mapping, payload: Buffer, from: RemoteInfo): void {
    const address = guestViewOf(parseAddress(from.address));
    if (!mapping.peers.has(address)) return;
    mapping.lastUsed = performance.now();
    this.#counters.udpToGuest++;
    this.#output.send(address, from.port, mapping.address, mapping.port, payload);
  }

  #remove(mapping: Mapping): void {
    this.#mappings.delete((mapping.address & 255) * 65536 + mapping.port);
    this.#counters.udpMappingsNow = this.#mappings.size;
    for (const flow of mapping.flows.values()) this.#release(flow);
    mapping.flows.clear();
    this.#sending -= mapping.sending; // a socket that could not be bound never tells
    mapping.sending = 0;
    const { socket } = mapping;
    mapping.socket = undefined;
    if (!socket) return;
    const closed = closeSocket(socket).then(() => void this.#closing.delete(closed));
    this.#closing.add(closed);
  }

  /** Closes what was not used for long. */
  sweep(now: number): void {
    for (const mapping of this.#mappings.values()) {
      if (now - mapping.lastUsed > this.#tuning.udpIdle) this.#remove(mapping);
    }
  }

  clear(): void {
    for (const mapping of [...this.#mappings.values()]) this.#remove(mapping);
  }

  async close(): Promise<void> {
    this.clear();
    await Promise.all(this.#closing);
  }
}
