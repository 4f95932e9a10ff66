import { VsockChannel } from '#dist/backends/vsock/channel.js';
import { addon } from '#dist/kvm/addon.js';
import { StateReader } from '#dist/state-reader.js';
import { VirtioVsock } from '#dist/virtio/vsock/vsock.js';
import type { Random } from '../../kvm/assist/random.js';
import { HEADER, Messages, message, notice, packet, parsePacket } from '../../unit/vsock/packets.js';
import { ManualEvents, ManualIo, PerMemory, sockets } from '../host.js';
import { type FuzzMachine, Violation } from '../machine.js';
import type { Request, Subject, Target } from '../target.js';

const CID = 3;
const MAX_PAYLOAD = 65_536;
const RECEIVE = 0;
const TRANSMIT = 1;
const EVENT = 2;
const NOISE = Uint8Array.from({ length: MAX_PAYLOAD + 100 }, (_, i) => (i * 151 + (i >> 7)) & 0xff);

/** A socket device over a real socket to a main thread that mostly keeps to the format. */
class VsockSubject implements Subject {
  device: VirtioVsock;
  readonly #io: ManualIo;
  readonly #events = new ManualEvents();
  readonly #channel: VsockChannel;
  readonly #fd: number;
  readonly #host: number;
  readonly #messages = new Messages();
  readonly #chunk = new Uint8Array(65_536);
  /** The host reads hardly anything, and the guest sends long packets. */
  readonly #clogged: boolean;
  /** Bytes that the socket did not take of a message to the guest. */
  #rest = new Uint8Array();
  #notice: Uint8Array | undefined;
  #sent = 0;
  #closed = false;
  #garbage = false;

  constructor(random: Random, io: ManualIo) {
    this.#io = io;
    this.#clogged = random.chance(25);
    const { device, host } = sockets(this.#clogged);
    this.#fd = device;
    this.#host = host;
    this.#channel = new VsockChannel(device, this.#events.events);
    this.device = this.#make();
  }

  renew(): VirtioVsock {
    this.device = this.#make();
    return this.device;
  }

  #make(): VirtioVsock {
    return new VirtioVsock({ cid: CID, channel: this.#channel, io: this.#io, warn: () => {} });
  }

  attach(machine: FuzzMachine): void {
    this.#io.onMemory = machine.checkIo;
  }

  queue(random: Random): number {
    return random.pick([RECEIVE, RECEIVE, TRANSMIT, TRANSMIT, TRANSMIT, EVENT]);
  }

  request(random: Random, queue: number): Request {
    if (queue !== TRANSMIT) {
      const room = random.pick([4096 + HEADER, 4096, HEADER + 1, HEADER, HEADER - 1, 0, 4, random.below(70_000)]);
      return { out: new Uint8Array(random.chance(97) ? 0 : 5), in: room };
    }
    const length = random.chance(70) ? random.below(300) : random.below(this.#clogged ? MAX_PAYLOAD + 50 : 3000);
    const out = packet({
      payload: NOISE.subarray(0, random.chance(70) ? length : 0),
      op: random.chance(60) ? 5 : random.below(9),
      ...(random.chance(5) && { srcCid: BigInt(random.u32()) }),
      ...(random.chance(5) && { dstCid: BigInt(random.u32()) << 32n }),
      ...(random.chance(10) && { len: random.chance(50) ? random.u32() : random.below(2 * length + 1) }),
      ...(random.chance(10) && { type: random.below(4) }),
    });
    if (random.chance(3)) random.fill(out.subarray(0, HEADER));
    return { out: random.chance(97) ? out : out.subarray(0, random.below(HEADER + 2)), in: random.chance(97) ? 0 : 5 };
  }

  hostEvent(random: Random): string {
    const dice = random.below(100);
    if (dice < 35) {
      for (let n = 1 + random.below(5); n > 0; n--) {
        const length = random.chance(70) ? random.below(200) : random.below(MAX_PAYLOAD + 1);
        this.#write(packet({ op: length > 0 ? 5 : 2, payload: NOISE.subarray(0, length) }));
      }
      return this.#events.fire(random) ? 'packets come, an event' : 'packets come';
    }
    if (dice < 70 && !(this.#clogged && random.chance(90))) {
      return `the host reads ${this.#read(random.chance(50) ? 1 + random.below(500) : 1 << 20)} bytes`;
    }
    if (dice < 80 && this.#notice) {
      this.#write(random.chance(80) ? this.#notice : notice(random.below(5), random.chance(50)));
      return 'the host answers a notice';
    }
    if (dice === 80 && !this.#closed) {
      addon.close(this.#host);
      this.#closed = true;
      return 'the host closes its end';
    }
    if (dice === 81 && !this.#closed) {
      this.#garbage = true;
      addon.write(this.#host, random.fill(new Uint8Array(60)), 0, 1 + random.below(60));
      return 'the host writes garbage';
    }
    if (dice === 82) {
      this.device.restore(new StateReader({ heardAt: random.chance(50) ? null : random.below(0x10000) }, 'device'));
      return 'the connections were interrupted';
    }
    return this.#events.fire(random) ? 'an event' : 'nothing';
  }

  settle(): boolean {
    for (let n = 0; n < 3 && this.#events.fire(); n++);
    return this.#read(1 << 20) > 0;
  }

  /** Packets for the guest, and events, come as they like. */
  serves(queue: number): boolean {
    return queue === TRANSMIT;
  }

  probe({ driver }: FuzzMachine): void {
    driver.initialize({ queueSizes: [8, 8, 8], features: 0n });
    const [receive, transmit] = driver.queues;
    while (this.settle());
    this.#sent = 0;
    transmit?.send([packet({ payload: NOISE.subarray(0, 60) })]);
    if (transmit?.completions().length !== 1) throw new Error('a packet was not sent');
    while (this.settle());
    if (this.#closed || this.#garbage || !this.#channel.up) return;
    if (this.#sent !== 1) throw new Error('a packet did not come out');
    receive?.send([2048]);
    this.#write(this.#notice as Uint8Array);
    // What was sent to the driver of before comes first, and is not for this one.
    for (let n = 0; n < 100; n++) {
      this.#write(packet({ srcPort: 4711, payload: NOISE.subarray(0, 10) }));
      this.settle();
      const [done] = receive?.completions() ?? [];
      if (!done) continue;
      const { srcPort, len } = parsePacket(done.data.subarray(0, done.written));
      if (srcPort !== 4711 || len !== 10) throw new Error(`a packet of ${len} bytes of port ${srcPort} was received`);
      return;
    }
    throw new Error('no packet was received');
  }

  end(): void {
    this.#channel[Symbol.dispose]();
    addon.close(this.#fd);
    if (!this.#closed) addon.close(this.#host);
  }

  #write(bytes: Uint8Array): void {
    if (this.#closed) return;
    if (this.#rest.length > 0) this.#flush();
    if (this.#rest.length > 0) return;
    this.#rest = new Uint8Array(message(bytes));
    this.#flush();
  }

  #flush(): void {
    const count = addon.write(this.#host, this.#rest, 0, this.#rest.length);
    if (count > 0) this.#rest = this.#rest.slice(count);
  }

  /** @returns how many bytes there were. */
  #read(most: number): number {
    let total = 0;
    while (!this.#closed && total < most) {
      const count = addon.read(this.#host, this.#chunk, 0, Math.min(this.#chunk.length, most - total));
      if (count <= 0) break;
      total += count;
      for (const bytes of this.#messages.push(this.#chunk.subarray(0, count))) this.#check(bytes);
    }
    if (this.#rest.length > 0 && !this.#closed) this.#flush();
    return total;
  }

  /** What the device says must make sense. */
  #check(bytes: Uint8Array): void {
    if (bytes.length === 5) {
      this.#notice = bytes;
      return;
    }
    if (bytes.length < HEADER) throw new Violation(`a message of ${bytes.length} bytes`);
    const { srcCid, dstCid, len, payload, op } = parsePacket(bytes);
    if (srcCid !== BigInt(CID) || dstCid !== 2n) throw new Violation(`a packet from ${srcCid} to ${dstCid}`);
    if (len !== payload.length || len > MAX_PAYLOAD) throw new Violation(`${payload.length} bytes of ${len}`);
    if (len > 0 && op !== 5) throw new Violation(`operation ${op} with data`);
    this.#sent++;
  }
}

const io = new PerMemory((memory) => new ManualIo(memory));

export const vsock: Target = {
  name: 'vsock',
  // A whole queue of the longest chains, and of the longest packets.
  limits: { accesses: 128 * 128 * 8 + 100_000, bytes: 128 * (HEADER + MAX_PAYLOAD) + 100_000 },
  subject: (random, memory) => new VsockSubject(random, io.get(memory)),
  dispose: () => io.dispose(),
};
