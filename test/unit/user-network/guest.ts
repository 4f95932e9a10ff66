import { mkdtempSync, rmSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { encodeOffloads, FrameStreamDecoder, GsoType } from '#dist/backends/frame-stream-format.js';
import { UserNetwork, type UserNetworkOptions } from '#dist/backends/user-network/user-network.js';
import type { Random } from '../../kvm/assist/random.js';
import { GuestTcp } from './guest-tcp.js';
import {
  arp,
  BROADCAST_MAC,
  checkTransport,
  type Datagram,
  ethernet,
  type Frame,
  GATEWAY,
  GUEST,
  NETWORK_MAC,
  parseFrame,
  parseIpv4,
  parseTcp,
  udp,
} from './packets.js';

/** Two ends of a Unix stream socket. */
export async function socketPair(): Promise<[Socket, Socket]> {
  const folder = mkdtempSync(join(tmpdir(), 'tsvisor-net-'));
  const path = join(folder, 'link');
  try {
    return await new Promise((resolve) => {
      let other: Socket;
      const server = createServer((socket) => {
        server.close();
        resolve([socket, other]);
      });
      server.listen(path, () => {
        other = connect(path);
      });
    });
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** What happens to frames on their way, in percent. */
export interface Trouble {
  random: Random;
  drop: number;
  duplicate: number;
  reorder: number;
}

/** Bytes; a longer frame of TCP has data. */
const DATA = 200;

/**
 * A guest on the other end of a network's stream. It checks every frame it gets: addresses, lengths, checksums and virtio
 * headers; what is wrong is in `faults`.
 */
export class Guest {
  readonly network: UserNetwork;
  readonly socket: Socket;
  readonly tcp: GuestTcp;
  readonly faults: string[] = [];
  offloads = 0;
  trouble: Trouble | undefined;
  /** Frames that nobody has waited for yet. */
  #frames: Frame[] = [];
  #waiters: { matches: (frame: Frame) => boolean; resolve: (frame: Frame) => void }[] = [];
  #held: Buffer | undefined;
  #lostData = false;
  frameCount = 0;
  largestFrame = 0;
  /** Frames of TCP are given to `tcp` unless this is set. */
  rawTcp = false;

  static async open(options: UserNetworkOptions = {}): Promise<Guest> {
    const network = await UserNetwork.open(options);
    return Guest.attach(network);
  }

  static async attach(network: UserNetwork): Promise<Guest> {
    const [device, link] = await socketPair();
    network.attach(link);
    return new Guest(network, device);
  }

  private constructor(network: UserNetwork, socket: Socket) {
    this.network = network;
    this.socket = socket;
    this.tcp = new GuestTcp(this);
    const decoder = new FrameStreamDecoder({
      frame: (bytes) => this.#incoming(Buffer.from(bytes)),
      control: () => this.faults.push('a control message from the network'),
    });
    socket.on('data', (chunk: Buffer) => {
      if (!decoder.push(chunk)) this.faults.push('broken stream');
    });
    socket.on('error', () => {});
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.tcp.dispose();
    await this.network.close();
    this.socket.destroy();
  }

  // ---- Sending

  setOffloads(mask: number): void {
    this.offloads = mask;
    this.socket.write(encodeOffloads(mask));
  }

  /** Sends an Ethernet frame behind a virtio header. */
  sendFrame(frame: Uint8Array, header: Uint8Array = Buffer.alloc(12)): void {
    const message = Buffer.concat([Buffer.alloc(4), header, frame]);
    message.writeUInt32BE(message.length - 4, 0);
    this.#deliver(message, (bytes) => this.socket.write(bytes));
  }

  /** Sends an IPv4 datagram. */
  send(datagram: Uint8Array, header?: Uint8Array): void {
    this.sendFrame(ethernet(0x0800, datagram), header);
  }

  sendUdp(destination: string, destinationPort: number, sourcePort: number, payload: string | Uint8Array): void {
    this.send(udp(destination, destinationPort, sourcePort, Buffer.from(payload)));
  }

  /** A gratuitous ARP, by which the network learns the guest's MAC. */
  announce(): void {
    this.sendFrame(ethernet(0x0806, arp(1, GUEST, GUEST), BROADCAST_MAC));
  }

  /** Resolves when the network has taken everything that was sent. */
  async settle(): Promise<void> {
    const id = Math.floor(Math.random() * 65536);
    const request = arp(1, GUEST, GATEWAY);
    request.writeUInt16BE(id, 8 + 4); // the sender's MAC comes back as the target's
    this.sendFrame(ethernet(0x0806, request, BROADCAST_MAC));
    await this.next((frame) => frame.type === 0x0806 && frame.payload.readUInt16BE(18 + 4) === id);
  }

  // ---- Receiving

  #deliver(bytes: Buffer, to: (bytes: Buffer) => void): void {
    const { trouble } = this;
    if (!trouble) {
      to(bytes);
      return;
    }
    const { random } = trouble;
    if (random.chance(trouble.drop)) return;
    if (random.chance(trouble.duplicate)) to(bytes);
    if (!this.#held && random.chance(trouble.reorder)) {
      this.#held = bytes;
      setTimeout(() => {
        if (this.#held !== bytes) return;
        this.#held = undefined;
        to(bytes);
      }, 20);
      return;
    }
    to(bytes);
    const held = this.#held;
    this.#held = undefined;
    if (held) to(held);
  }

  #incoming(bytes: Buffer): void {
    this.frameCount++;
    this.largestFrame = Math.max(this.largestFrame, bytes.length);
    const frame = parseFrame(bytes);
    try {
      this.#check(frame);
    } catch (error) {
      this.faults.push((error as Error).message);
      return;
    }
    if (this.trouble) {
      const { random } = this.trouble;
      // One with data at the least, whatever chance says.
      const lost = random.chance(this.trouble.drop) || (bytes.length > DATA && !this.#lostData);
      if (lost && bytes.length > DATA) this.#lostData = true;
      if (lost) return;
      if (random.chance(this.trouble.duplicate)) this.#accept(frame);
    }
    this.#accept(frame);
  }

  #check(frame: Frame): void {
    if (!frame.sourceMac.equals(NETWORK_MAC)) throw new Error(`from ${frame.sourceMac.toString('hex')}`);
    if (frame.type !== 0x0800) return;
    const datagram = parseIpv4(frame);
    const broadcast = frame.destinationMac.equals(BROADCAST_MAC);
    if (broadcast !== (datagram.destination === '255.255.255.255')) throw new Error('wrong destination MAC');
    if (datagram.fragment & 0x3fff) {
      if (frame.flags || frame.payload.length > 1500) throw new Error('a fragment with offloads or above the MTU');
    } else {
      checkTransport(datagram, this.offloads);
    }
  }

  #accept(frame: Frame): void {
    if (!this.rawTcp && frame.type === 0x0800 && frame.payload[9] === 6) {
      this.tcp.input(parseTcp(parseIpv4(frame)));
      return;
    }
    const index = this.#waiters.findIndex((waiter) => waiter.matches(frame));
    if (index < 0) this.#frames.push(frame);
    else this.#waiters.splice(index, 1)[0]?.resolve(frame);
  }

  /** The next frame that matches, of those that came already first. */
  next(matches: (frame: Frame) => boolean): Promise<Frame> {
    const index = this.#frames.findIndex(matches);
    if (index >= 0) return Promise.resolve(this.#frames.splice(index, 1)[0] as Frame);
    return new Promise((resolve) => this.#waiters.push({ matches, resolve }));
  }

  /** The frames that came and match. */
  taken(matches: (frame: Frame) => boolean): Frame[] {
    const taken = this.#frames.filter(matches);
    this.#frames = this.#frames.filter((frame) => !taken.includes(frame));
    return taken;
  }

  async nextDatagram(matches: (datagram: Datagram) => boolean): Promise<Datagram> {
    return parseIpv4(await this.next((frame) => frame.type === 0x0800 && matches(parseIpv4(frame))));
  }

  /** The payload of the next UDP datagram to a port of the guest; fragments are put together. */
  async nextUdp(port: number): Promise<{ source: string; sourcePort: number; payload: Buffer }> {
    const first = await this.nextDatagram(
      (d) => d.protocol === 17 && !(d.fragment & 0x1fff) && d.payload.readUInt16BE(2) === port,
    );
    const total = first.payload.readUInt16BE(4);
    let payload = first.payload;
    while (payload.length < total) {
      const { length } = payload;
      const more = await this.nextDatagram((d) => d.id === first.id && (d.fragment & 0x1fff) * 8 === length);
      payload = Buffer.concat([payload, more.payload]);
    }
    if (first.fragment & 0x2000) this.#checkReassembled(first, payload);
    return { source: first.source, sourcePort: payload.readUInt16BE(0), payload: payload.subarray(8) };
  }

  #checkReassembled(first: Datagram, payload: Buffer): void {
    const frame = { ...first.frame, payload: Buffer.alloc(0) };
    try {
      checkTransport({ ...first, frame, payload }, this.offloads);
    } catch (error) {
      this.faults.push((error as Error).message);
    }
  }

  /** A virtio header for a TCP segment whose checksum, and perhaps segmentation, is left to the network. */
  static offloadHeader(mss: number, large: boolean): Buffer {
    const header = Buffer.alloc(12);
    header[0] = 1;
    header[1] = large ? GsoType.TCPV4 : GsoType.NONE;
    header.writeUInt16LE(54, 2);
    header.writeUInt16LE(large ? mss : 0, 4);
    header.writeUInt16LE(34, 6);
    header.writeUInt16LE(16, 8);
    return header;
  }
}
