import { Socket } from 'node:net';
import type { Readable } from 'node:stream';
import { VsockHost } from '#dist/backends/vsock/vsock-host.js';
import { addon } from '#dist/kvm/addon.js';
import {
  GUEST_CID,
  HEADER,
  Messages,
  message,
  NOTHING,
  notice,
  Op,
  type Packet,
  packet,
  parsePacket,
} from './packets.js';

/** Bytes of a buffer of the guest. */
export const GUEST_BUFFER = 65_536;

/** One end of a connection in the guest: what its packets are about. */
export interface Ports {
  /** Of the guest. */
  readonly srcPort: number;
  /** Of the host. */
  readonly dstPort: number;
}

/** The other end of the channel of a VsockHost: a device and its guest, of which the test decides every packet. */
export class FakeGuest implements AsyncDisposable {
  readonly host: VsockHost;
  readonly warnings: string[];
  readonly notices: Uint8Array[] = [];
  /** Not taken by next() yet. */
  readonly packets: Packet[] = [];
  readonly socket: Socket;
  /** The host's end of the channel. */
  readonly channel: Socket;
  /** Called instead of keeping packets. */
  onPacket: ((packet: Packet) => void) | undefined;
  readonly #messages = new Messages();
  #generation = 0;
  #wake = () => {};

  private constructor(host: VsockHost, warnings: string[]) {
    this.host = host;
    this.warnings = warnings;
    const [here, there] = addon.socketpair() as [number, number];
    for (const fd of [here, there]) addon.release(fd);
    this.socket = new Socket({ fd: here, readable: true, writable: true, allowHalfOpen: true });
    this.channel = new Socket({ fd: there, readable: true, writable: true });
    host.attach(this.channel);
    this.socket.on('error', () => {});
    this.socket.on('data', (chunk) => {
      for (const bytes of this.#messages.push(chunk)) {
        if (bytes.length < HEADER) this.notices.push(bytes);
        else if (this.onPacket) this.onPacket(parsePacket(bytes));
        else this.packets.push(parsePacket(bytes));
      }
      this.#wake();
    });
  }

  /** @param driver whether the guest's driver runs. */
  static async make({ driver = true, socket }: { driver?: boolean; socket?: string } = {}): Promise<FakeGuest> {
    const warnings: string[] = [];
    const host = await VsockHost.open({ cid: GUEST_CID, socket, warn: (message) => void warnings.push(message) });
    const guest = new FakeGuest(host, warnings);
    if (driver) await guest.driver(true);
    return guest;
  }

  /** The guest's driver comes or goes. */
  async driver(up: boolean): Promise<void> {
    const bytes = notice(++this.#generation, up);
    this.socket.write(message(bytes));
    await this.until(() => this.notices.some((one) => Buffer.compare(one, bytes) === 0));
  }

  send(fields: Partial<Packet>): void {
    this.socket.write(message(packet({ bufAlloc: GUEST_BUFFER, ...fields })));
  }

  async until(what: () => boolean): Promise<void> {
    const end = Date.now() + 10_000;
    while (!what()) {
      if (Date.now() > end) throw new Error(`it never came to be that ${what}`);
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
        setTimeout(resolve, 20);
      });
    }
  }

  /** The next packet, which is of that operation. */
  async next(op: number): Promise<Packet> {
    await this.until(() => this.packets.length > 0);
    const packet = this.packets.shift() as Packet;
    if (packet.op !== op) throw new Error(`operation ${packet.op} instead of ${op}`);
    return packet;
  }

  /** All that the host had to say to what it was sent was said: it answers a question. */
  async quiet(): Promise<Packet[]> {
    this.send({ srcPort: 99, dstPort: 99, op: Op.RW });
    await this.until(() => this.packets.some(({ op, srcPort }) => op === Op.RST && srcPort === 99));
    return this.packets.splice(0).filter(({ srcPort }) => srcPort !== 99);
  }

  /** The host connects to a port of the guest. */
  async connected(port = 1000, fields: Partial<Packet> = {}) {
    const connecting = this.host.connect(port);
    const request = await this.next(Op.REQUEST);
    const ports = { srcPort: request.dstPort, dstPort: request.srcPort };
    this.send({ ...ports, op: Op.RESPONSE, ...fields });
    return { stream: await connecting, ports };
  }

  /** The guest connects to a port of the host, where somebody listens. */
  async request(ports: Ports, fields: Partial<Packet> = {}): Promise<Packet> {
    this.send({ ...ports, op: Op.REQUEST, ...fields });
    return this.next(Op.RESPONSE);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.host.close(new Error('the test is over'));
    const closed = new Promise((resolve) => this.channel.once('close', resolve));
    if (this.channel.closed) return;
    this.channel.destroy();
    this.socket.destroy();
    await closed;
  }
}

/** A guest's end of a connection that keeps to the protocol, and reads and writes as it is told. */
export class LawfulEnd {
  readonly received: Uint8Array[] = [];
  readonly #guest: FakeGuest;
  readonly #ports: Ports;
  readonly #buffer: number;
  /** What it reads of a packet at once; the rest of its buffer stays in use until it reads on. */
  readonly #reads: boolean;
  #toSend: Uint8Array = NOTHING;
  #fwdCnt = 0;
  #sent = 0;
  #peer = { bufAlloc: 0, fwdCnt: 0 };
  /** The greatest number of bytes that it had to hold. */
  held = 0;

  constructor(guest: FakeGuest, ports: Ports, first: Packet | undefined, buffer = GUEST_BUFFER, reads = true) {
    this.#guest = guest;
    this.#ports = ports;
    this.#buffer = buffer;
    this.#reads = reads;
    if (first) this.#peer = first;
  }

  get bytes(): Buffer {
    return Buffer.concat(this.received);
  }

  handle(packet: Packet): void {
    this.#peer = packet;
    if (packet.op === Op.RW) {
      this.received.push(packet.payload);
      this.held += packet.payload.length;
      if (this.held > this.#buffer) throw new Error(`${this.held} bytes in a buffer of ${this.#buffer}`);
      if (this.#reads) this.read();
    } else if (packet.op === Op.CREDIT_REQUEST) {
      this.#send(Op.CREDIT_UPDATE);
    }
    this.#pump();
  }

  /** Reads all it has. */
  read(): void {
    this.#fwdCnt = (this.#fwdCnt + this.held) >>> 0;
    this.held = 0;
    this.#send(Op.CREDIT_UPDATE);
  }

  write(bytes: Uint8Array): void {
    this.#toSend = bytes;
    this.#pump();
  }

  #pump(): void {
    const credit = this.#peer.bufAlloc - ((this.#sent - this.#peer.fwdCnt) >>> 0);
    const part = this.#toSend.subarray(0, Math.min(credit, 4096));
    if (part.length === 0) return;
    this.#toSend = this.#toSend.subarray(part.length);
    this.#sent = (this.#sent + part.length) >>> 0;
    this.#send(Op.RW, part);
    this.#pump();
  }

  #send(op: number, payload: Uint8Array = NOTHING): void {
    this.#guest.send({ ...this.#ports, op, payload, bufAlloc: this.#buffer, fwdCnt: this.#fwdCnt });
  }
}

/** What a stream brings until it ends; iterating over it would destroy it then. */
export async function input(stream: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  stream.on('data', (chunk: Buffer) => chunks.push(chunk));
  await new Promise((resolve, reject) => stream.once('end', resolve).once('error', reject));
  return Buffer.concat(chunks);
}
