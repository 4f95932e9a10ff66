import { FrameStream } from '#dist/backends/frame-stream.js';
import { FrameStreamDecoder } from '#dist/backends/frame-stream-format.js';
import type { GuestIo } from '#dist/backends/guest-io.js';
import { addon } from '#dist/kvm/addon.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { type NetBackend, Offload, type SendResult } from '#dist/virtio/net/backend.js';
import { Net } from '#dist/virtio/net/net.js';
import type { Segments } from '#dist/virtio/segments.js';
import type { Random } from '../../kvm/assist/random.js';
import { ManualEvents, ManualIo, ManualTimer, PerMemory, sockets } from '../host.js';
import { type FuzzMachine, Violation } from '../machine.js';
import type { Request, Subject, Target } from '../target.js';

const { virtio_net_hdr_v1: at } = abi;
const HEADER = at.sizeof;
const ETHERNET = 14;
const MAX_FRAME = 65_550;
/** Frames that wait on the host. */
const BACKLOG = 300;
const NOISE = Uint8Array.from({ length: HEADER + MAX_FRAME + 100 }, (_, i) => (i * 151 + (i >> 7)) & 0xff);
const NOTHING = 'nothing to read';
const RECEIVE = 0;
const TRANSMIT = 1;

/** A frame for the guest: its header is what the host may say, nearly always. */
function frameForGuest(random: Random): Uint8Array {
  const length = random.chance(80) ? ETHERNET + random.below(1500) : random.below(MAX_FRAME + 50);
  const frame = NOISE.slice(0, HEADER + length);
  frame.fill(0, 0, HEADER);
  if (random.chance(20)) frame[at.flags] = random.below(4);
  if (random.chance(20)) frame[at.gso_type] = random.pick([1, 3, 4, 0x81, random.below(256)]);
  if (random.chance(20)) random.fill(frame.subarray(2, HEADER));
  return frame;
}

/** What a backend is sent must make sense (section 5.1.6.2). */
function checkSent(header: Uint8Array, length: number): void {
  const view = new DataView(header.buffer, header.byteOffset, HEADER);
  const gso = header[at.gso_type] as number;
  const partial = ((header[at.flags] as number) & abi.VIRTIO_NET_HDR_F_NEEDS_CSUM) !== 0;
  const end = view.getUint16(at.csum_start, true) + view.getUint16(at.csum_offset, true) + 2;
  if (length < ETHERNET || length > MAX_FRAME) throw new Violation(`a frame of ${length} bytes was sent`);
  if (partial && end > length) throw new Violation(`a checksum at ${end} of a frame of ${length} bytes`);
  if (gso !== 0 && (!partial || view.getUint16(at.gso_size, true) === 0)) throw new Violation(`GSO of type ${gso}`);
  if (view.getUint16(at.hdr_len, true) > length) throw new Violation('a header longer than its frame');
}

/** A backend of which the fuzzer decides everything. */
class FakeBackend implements NetBackend {
  readonly offloads: number;
  readonly mtu: number | undefined;
  up = true;
  plain = false;
  onReadable = () => {};
  onWritable = () => {};
  onDown = () => {};
  /** For the guest. */
  readonly frames: Uint8Array[] = [];
  sent = 0;
  readable = false;
  writable = false;
  readonly #random: Random;

  constructor(random: Random) {
    this.#random = random;
    this.offloads = random.pick([0, Offload.checksum, 3, 5, 15]);
    this.mtu = random.chance(50) ? undefined : random.pick([68, 1500, 9000, 65535]);
  }

  setOffloads(offloads: number): void {
    if (offloads & ~this.offloads) throw new Violation(`offloads ${offloads} of ${this.offloads}`);
  }

  send(_io: GuestIo, header: Uint8Array, frame: Segments): SendResult {
    checkSent(header, frame.length);
    const result = this.plain ? 'taken' : this.#random.pick(['taken', 'taken', 'taken', 'full', 'refused'] as const);
    if (result === 'taken') this.sent++;
    return this.up ? result : 'refused';
  }

  awaitWritable(): void {
    this.writable = true;
  }

  awaitReadable(): void {
    this.readable = true;
  }

  receive(): Uint8Array | undefined {
    return this.frames.shift();
  }
}

abstract class NetSubject implements Subject {
  device: Net;
  readonly #make: () => Net;
  readonly #timer = new ManualTimer();
  readonly #io: ManualIo;
  readonly #transmits: number;
  /** The host reads hardly anything, and the guest sends long frames. */
  protected readonly clogged: boolean;

  constructor(random: Random, backend: NetBackend, io: ManualIo, transmits: number, clogged = false) {
    this.#io = io;
    this.#transmits = transmits;
    this.clogged = clogged;
    const mac = random.fill(new Uint8Array(6));
    this.#make = () => new Net({ name: 'net0', mac, backend, io, timer: this.#timer.make });
    this.device = this.#make();
  }

  renew(): Net {
    this.#timer.armed = false;
    this.device = this.#make();
    return this.device;
  }

  attach(machine: FuzzMachine): void {
    this.#io.onMemory = machine.checkIo;
  }

  queue(random: Random): number {
    return random.chance(this.#transmits) ? TRANSMIT : RECEIVE;
  }

  request(random: Random, queue: number): Request {
    if (queue === RECEIVE) {
      const room = random.pick([HEADER + 1514, 4096, 65_562, 100, HEADER, HEADER - 1, 0, random.below(70_000)]);
      return { out: new Uint8Array(random.chance(97) ? 0 : 5), in: room };
    }
    const length = random.chance(85)
      ? ETHERNET + random.below(300)
      : random.below(!this.clogged && random.chance(80) ? 40 : MAX_FRAME + 20);
    const out = NOISE.slice(0, HEADER + length);
    const view = new DataView(out.buffer);
    out.fill(0, 0, HEADER);
    if (random.chance(30)) {
      out[at.flags] = 1;
      view.setUint16(at.csum_start, random.below(length + 4), true);
      view.setUint16(at.csum_offset, random.chance(90) ? random.below(20) : random.u32(), true);
      if (random.chance(50)) {
        out[at.gso_type] = random.pick([1, 1, 4, 3, 0x81, 0x84, 0x80, random.below(256)]);
        view.setUint16(at.gso_size, random.chance(90) ? 1 + random.below(1500) : random.below(3), true);
        view.setUint16(at.hdr_len, random.chance(80) ? 54 : random.u32(), true);
      }
    }
    if (random.chance(5)) random.fill(out.subarray(0, HEADER));
    return {
      out: random.chance(97) ? out : out.subarray(0, random.below(HEADER + ETHERNET)),
      in: random.chance(97) ? 0 : 5,
    };
  }

  hostEvent(random: Random): string {
    if (this.#timer.armed && random.chance(30)) {
      this.#timer.fire();
      return 'the timer expires';
    }
    return this.backendEvent(random);
  }

  abstract settle(): boolean;

  /** Frames for the guest come as they like. */
  serves(queue: number): boolean {
    return queue === TRANSMIT;
  }

  protected abstract backendEvent(random: Random): string;
  /** Whether frames go both ways, once it is settled. */
  protected abstract get up(): boolean;
  /** Whether the device has not given the stream up. */
  protected abstract get linked(): boolean;
  /** Frames that reached the other side since the last time. */
  protected abstract takeSent(): number;
  protected abstract deliver(frame: Uint8Array): void;

  probe({ driver }: FuzzMachine): void {
    driver.initialize({ queueSizes: [8, 8], features: 0n });
    const [receive, transmit] = driver.queues;
    while (this.settle());
    this.takeSent();
    transmit?.send([new Uint8Array(HEADER), NOISE.subarray(0, 60)]);
    if (transmit?.completions().length !== 1) throw new Error('a frame was not sent');
    if (!this.up) return;
    if (this.takeSent() !== 1) throw new Error('a frame did not come out');
    receive?.send([2048]);
    const frame = NOISE.slice(0, HEADER + 60);
    frame.fill(0, 0, HEADER);
    this.deliver(frame);
    // Frames from before may have come first, and dropped what came after.
    for (let n = 0; n < 2 * BACKLOG; n++) {
      const [done] = receive?.completions() ?? [];
      if (done) {
        if (done.written < HEADER || done.written > 2048) throw new Error(`${done.written} bytes were received`);
        return;
      }
      if (this.#timer.armed) this.#timer.fire();
      if (!this.linked) return; // what the host had sent before ended the stream
      this.deliver(frame);
    }
    throw new Error('no frame was received');
  }

  end(): void {}
}

class FakeSubject extends NetSubject {
  readonly #backend: FakeBackend;

  constructor(random: Random, io: ManualIo, transmits: number) {
    const backend = new FakeBackend(random);
    super(random, backend, io, transmits);
    this.#backend = backend;
  }

  protected backendEvent(random: Random): string {
    const backend = this.#backend;
    if (backend.up && random.chance(1)) {
      backend.up = false;
      backend.onDown();
      return 'the link goes down';
    }
    if (random.chance(30)) {
      if (!backend.writable && !random.chance(20)) return 'nothing';
      backend.writable = false;
      backend.onWritable();
      return 'there is room';
    }
    for (let n = 1 + random.below(random.chance(95) ? 4 : BACKLOG); n > 0 && backend.frames.length < BACKLOG; n--) {
      backend.frames.push(frameForGuest(random));
    }
    if (!backend.readable && !random.chance(20)) return 'frames come';
    backend.readable = false;
    backend.onReadable();
    return 'frames come, and the device hears of it';
  }

  settle(): boolean {
    const backend = this.#backend;
    backend.plain = true;
    if (!backend.writable) return false;
    backend.writable = false;
    backend.onWritable();
    return true;
  }

  protected get up(): boolean {
    return this.#backend.up;
  }

  protected get linked(): boolean {
    return this.#backend.up;
  }

  protected takeSent(): number {
    const { sent } = this.#backend;
    this.#backend.sent = 0;
    return sent;
  }

  protected deliver(frame: Uint8Array): void {
    this.#backend.frames.push(frame.slice());
    this.#backend.onReadable();
  }
}

/** Over a real socket to a host that mostly keeps to the format. */
class StreamSubject extends NetSubject {
  readonly #backend: FrameStream;
  readonly #events: ManualEvents;
  readonly #device: number;
  readonly #host: number;
  readonly #decoder: FrameStreamDecoder;
  readonly #chunk = new Uint8Array(65_536);
  #sent = 0;
  #closed = false;
  #garbage = false;
  /** Bytes that the socket did not take of the last message to the guest. */
  #rest = new Uint8Array();

  constructor(random: Random, io: ManualIo, transmits: number) {
    const events = new ManualEvents();
    const clogged = random.chance(25);
    const { device, host } = sockets(clogged);
    const backend = new FrameStream(device, events.events, Offload.checksum | Offload.tso4);
    super(random, backend, io, transmits, clogged);
    this.#backend = backend;
    this.#events = events;
    this.#device = device;
    this.#host = host;
    this.#decoder = new FrameStreamDecoder({
      frame: (bytes) => {
        if (bytes.length < HEADER) throw new Violation('a message shorter than a header');
        checkSent(bytes, bytes.length - HEADER);
        this.#sent++;
      },
      control: (bytes) => {
        if (bytes.length !== 2 || bytes[0] !== 1 || ((bytes[1] as number) & ~3) !== 0)
          throw new Violation('a control message');
      },
    });
  }

  protected backendEvent(random: Random): string {
    const dice = random.below(100);
    if (dice < 45) {
      for (let n = 1 + random.below(5); n > 0; n--) this.#write(frameForGuest(random));
      return this.#events.fire(random) ? 'frames come, an event' : 'frames come';
    }
    if (dice < 70 && !(this.clogged && random.chance(90)))
      return this.#read(random.chance(50) ? 1 + random.below(500) : 1 << 20);
    if (dice === 70 && !this.#closed) {
      addon.close(this.#host);
      this.#closed = true;
      return 'the host closes its end';
    }
    if (dice === 71) {
      this.#garbage = true;
      if (!this.#closed) addon.write(this.#host, random.fill(new Uint8Array(40)), 0, 1 + random.below(40));
      return 'the host writes garbage';
    }
    return this.#events.fire(random) ? 'an event' : 'nothing';
  }

  settle(): boolean {
    this.#fireAll();
    return this.#read(1 << 20) !== NOTHING;
  }

  protected get up(): boolean {
    return this.#backend.up && !this.#closed && !this.#garbage && this.#rest.length === 0;
  }

  protected get linked(): boolean {
    return this.#backend.up;
  }

  protected takeSent(): number {
    while (this.settle());
    const sent = this.#sent;
    this.#sent = 0;
    return sent;
  }

  protected deliver(frame: Uint8Array): void {
    this.#write(frame);
    this.#fireAll();
  }

  override end(): void {
    this.#backend[Symbol.dispose]();
    addon.close(this.#device);
    if (!this.#closed) addon.close(this.#host);
  }

  #fireAll(): void {
    for (let n = 0; n < 3 && this.#events.fire(); n++);
  }

  #write(frame: Uint8Array): void {
    if (this.#closed) return;
    if (this.#rest.length === 0) {
      const message = new Uint8Array(4 + frame.length);
      new DataView(message.buffer).setUint32(0, frame.length);
      message.set(frame, 4);
      this.#rest = message;
    }
    const count = addon.write(this.#host, this.#rest, 0, this.#rest.length);
    if (count > 0) this.#rest = this.#rest.slice(count);
  }

  #read(most: number): string {
    if (this.#closed) return NOTHING;
    let total = 0;
    while (total < most) {
      const count = addon.read(this.#host, this.#chunk, 0, Math.min(this.#chunk.length, most - total));
      if (count <= 0) break;
      total += count;
      if (!this.#decoder.push(this.#chunk.subarray(0, count))) throw new Violation('the device broke the stream');
    }
    return total > 0 ? `the host reads ${total} bytes` : NOTHING;
  }
}

function target(name: string, transmits: number): Target {
  const io = new PerMemory((memory) => new ManualIo(memory));
  return {
    name,
    // A frame that does not fit is tried with all buffers that there are, and so may each of a batch be.
    limits: { accesses: 40_000_000, bytes: 256 * (HEADER + MAX_FRAME) + 100_000 },
    subject: (random, memory) =>
      new (random.chance(50) ? FakeSubject : StreamSubject)(random, io.get(memory), transmits),
    dispose: () => io.dispose(),
  };
}

export const netTransmit = target('net-tx', 85);
export const netReceive = target('net-rx', 15);
