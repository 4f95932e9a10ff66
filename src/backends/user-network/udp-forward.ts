import type { RemoteInfo, Socket } from 'node:dgram';
import { GATEWAY } from './addresses.js';
import type { Counters } from './counters.js';
import type { Tuning } from './tuning.js';
import type { Datagram, UdpOutput } from './udp.js';
import { closeSocket, udpSocket } from './udp-socket.js';

/** What peers become to the guest: ports of 10.0.2.2. */
const FIRST_PORT = 49152;
const PORTS = 65536 - FIRST_PORT;
/** Datagrams that host sockets have not sent yet; each may hold a buffer of 64 KiB. */
const MAX_SENDING = 256;

/** Who has sent something to a forward. */
interface Peer {
  readonly key: number;
  readonly name: string;
  readonly socket: Socket;
  readonly address: string;
  readonly port: number;
  lastUsed: number;
}

/** UDP ports of the host that lead to the guest. */
export class UdpForwards {
  readonly #counters: Counters;
  readonly #tuning: Tuning;
  readonly #output: UdpOutput;
  readonly #sockets: Socket[] = [];
  /** By guest address and port and the port that the guest sees, and by forward and peer: the same. */
  readonly #byKey = new Map<number, Peer>();
  /** The least recently used first. */
  readonly #byName = new Map<string, Peer>();
  #nextPort = 0;
  #sending = 0;

  constructor(counters: Counters, tuning: Tuning, output: UdpOutput) {
    this.#counters = counters;
    this.#tuning = tuning;
    this.#output = output;
  }

  /** @returns the real port. Rejects with the error of bind(2). */
  bind(address: string, port: number, guest: number, guestPort: number): Promise<number> {
    const socket = udpSocket();
    const prefix = `${this.#sockets.push(socket)} `;
    socket.on('message', (payload, from) => {
      const peer = this.#peerOf(prefix, socket, from, guest, guestPort);
      this.#counters.udpToGuest++;
      this.#output.send(GATEWAY, peer.key % 65536, guest, guestPort, payload);
    });
    return new Promise((resolve, reject) => {
      socket.once('error', reject);
      socket.bind({ address, port, exclusive: true }, () => {
        socket.off('error', reject);
        socket.on('error', () => void this.#counters.hostErrors++);
        resolve(socket.address().port);
      });
    });
  }

  #peerOf(prefix: string, socket: Socket, from: RemoteInfo, guest: number, guestPort: number): Peer {
    const name = `${prefix}${from.address}:${from.port}`;
    let peer = this.#byName.get(name);
    if (peer) this.#byName.delete(name);
    else {
      const [oldest] = this.#byName.size >= this.#tuning.forwardPeers ? this.#byName.values() : [];
      if (oldest) this.#remove(oldest);
      peer = { key: this.#newKey(guest, guestPort), name, socket, address: from.address, port: from.port, lastUsed: 0 };
      this.#byKey.set(peer.key, peer);
    }
    this.#byName.set(name, peer);
    peer.lastUsed = performance.now();
    return peer;
  }

  /** There are more ports than peers. */
  #newKey(guest: number, guestPort: number): number {
    for (;;) {
      this.#nextPort = (this.#nextPort + 1) % PORTS;
      const key = keyOf(guest, guestPort, FIRST_PORT + this.#nextPort);
      if (!this.#byKey.has(key)) return key;
    }
  }

  /** Takes a datagram of the guest to the gateway if it answers a peer. @returns whether it does. */
  input(datagram: Datagram): boolean {
    const { source, sourcePort, destinationPort, payload } = datagram;
    const peer = this.#byKey.get(keyOf(source, sourcePort, destinationPort));
    if (!peer) return false;
    if (this.#sending >= MAX_SENDING) {
      this.#counters.dropped.limit++;
      return true;
    }
    peer.lastUsed = performance.now();
    this.#sending++;
    this.#counters.udpToHost++;
    peer.socket.send(payload, peer.port, peer.address, this.#sent);
    return true;
  }

  readonly #sent = (error: Error | null): void => {
    this.#sending--;
    if (error) this.#counters.hostErrors++;
  };

  #remove(peer: Peer): void {
    this.#byKey.delete(peer.key);
    this.#byName.delete(peer.name);
  }

  /** Forgets peers that were not heard of for long. */
  sweep(now: number): void {
    for (const peer of this.#byName.values()) {
      if (now - peer.lastUsed > this.#tuning.udpIdle) this.#remove(peer);
    }
  }

  async close(): Promise<void> {
    await Promise.all(this.#sockets.map(closeSocket));
    this.#sockets.length = 0;
    this.#byKey.clear();
    this.#byName.clear();
  }
}

function keyOf(guest: number, guestPort: number, port: number): number {
  return ((guest & 255) * 65536 + guestPort) * 65536 + port;
}
