import type { GuestIo } from '../../backends/guest-io.js';
import type { VsockChannel } from '../../backends/vsock/channel.js';
import { HEADER_SIZE, HOST_CID, MAX_PAYLOAD } from '../../backends/vsock/packet.js';
import type { StateReader } from '../../state-reader.js';
import type { DescriptorChain } from '../chain.js';
import { feature, type VirtioContext, type VirtioModel } from '../device.js';
import * as abi from '../generated/virtio.js';
import type { Virtqueue } from '../queue.js';
import { Segments } from '../segments.js';

const { virtio_vsock_hdr: at } = abi;

/** Feature bits (section 5.10.3); newer than the kernel headers that the others are from. */
const VIRTIO_VSOCK_F_STREAM = 0;

const RECEIVE = 0;
const TRANSMIT = 1;
const EVENT = 2;
/** Linux fills the receive queue with buffers of 4 KiB when it finds the device, and keeps 8 for events. */
const QUEUE_SIZES = [64, 128, 8];

export interface VsockOptions {
  /** The guest's address, 3 to 2^32 - 2. */
  readonly cid: number;
  readonly channel: VsockChannel;
  readonly io: GuestIo;
  /** Tells of what the guest did wrong; as often as it does. */
  readonly warn: (message: string) => void;
}

/**
 * Socket device (virtio 1.2 section 5.10): carries packets between its queues and a channel to the main thread, where
 * the connections end. Packets of the guest wait in its queue while the channel is full; packets for it wait in the
 * channel while it gives no buffers, all but one.
 */
export class VirtioVsock implements VirtioModel {
  readonly name = 'vsock';
  readonly type = abi.VIRTIO_ID_VSOCK;
  readonly queueSizes = QUEUE_SIZES;
  readonly features = feature(VIRTIO_VSOCK_F_STREAM);
  readonly #cid: number;
  readonly #channel: VsockChannel;
  readonly #io: GuestIo;
  readonly #warn: (message: string) => void;
  readonly #config = new Uint8Array(abi.virtio_vsock_config.sizeof);
  /** Of the packet that is sent, and of a part of the one that is received. */
  readonly #sent = headerBytes();
  readonly #received = headerBytes();
  #payload: Segments | undefined;
  #queues: readonly Virtqueue[] = [];
  /** The packet that found no buffers: nothing is read after it until they are there. And how much of it found some. */
  #waiting: Uint8Array | undefined;
  #delivered = 0;
  /** The channel was full: it says when it is not. */
  #full = false;
  /** The driver is to be told that its connections are no more; there was no buffer for that yet. */
  #transportReset = false;
  /** The event queue's avail.idx from which on it has heard all that it was told. undefined: it has. */
  #heardAt: number | undefined;

  constructor({ cid, channel, io, warn }: VsockOptions) {
    this.#cid = cid;
    this.#channel = channel;
    this.#io = io;
    this.#warn = warn;
    new DataView(this.#config.buffer).setUint32(abi.virtio_vsock_config.guest_cid, cid, true);
    channel.onReadable = () => this.#receive();
    channel.onWritable = channel.onDown = () => {
      this.#full = false;
      this.#transmit(); // with no other end to nowhere: every request is to be completed
    };
    channel.setDriver(false); // there was one before the machine was reset, perhaps
  }

  readConfig(offset: number, out: Uint8Array): void {
    out.set(this.#config.subarray(offset, offset + out.length));
  }

  activate({ memory, queues }: VirtioContext): void {
    this.#payload = new Segments(memory);
    this.#queues = queues;
    this.#channel.setDriver(true);
    this.#channel.awaitReadable();
  }

  handleQueue(index: number): void {
    if (index === TRANSMIT) this.#transmit();
    else if (index === RECEIVE) {
      if (this.#waiting) this.#receive();
    } else this.#handleEvents();
  }

  #handleEvents(): void {
    this.#sendEvent();
    const queue = this.#queues[EVENT];
    if (!queue || this.#heardAt === undefined || (queue.awaitNext() - this.#heardAt) & 0x8000) return;
    this.#heardAt = undefined;
    this.#receive();
  }

  reset(): void {
    if (this.#queues.length > 0) this.#channel.setDriver(false);
    this.#queues = [];
    this.#waiting = undefined;
    this.#delivered = 0;
    this.#transportReset = false;
    this.#heardAt = undefined;
  }

  /** Connections are not saved: their other ends are not here any more when the guest goes on. */
  save(): { heardAt: number | null } {
    return { heardAt: this.#heardAt ?? null };
  }

  /**
   * Tells the guest that its connections were interrupted (section 5.10.6.7). Until it has heard, packets for it wait: it
   * would take them for those of before.
   */
  restore(state: StateReader): void {
    if (this.#queues.length === 0) return;
    if (state.raw('heardAt') !== null) this.#heardAt = state.number('heardAt', 0, 0xffff);
    this.#transportReset = true;
    this.#sendEvent();
  }

  /** A queue's worth of packets at most: what is pushed is the driver's only when it is published. */
  #transmit(): void {
    const queue = this.#queues[TRANSMIT];
    if (!queue || this.#full) return;
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      if (!this.#send(chain)) {
        queue.unpop(chain);
        this.#full = true;
        this.#channel.awaitWritable();
        break;
      }
      queue.push(chain, 0);
    }
    queue.publish();
  }

  /** Sends a packet or drops it. @returns false when the channel is full. */
  #send({ readable }: DescriptorChain): boolean {
    const { bytes, view } = this.#sent;
    const available = readable.length - HEADER_SIZE;
    if (available < 0) return this.#drop(`${readable.length} bytes, less than a header`);
    readable.read(0, bytes);
    // The upper halves are reserved and zero (sections 5.10.4 and 5.10.6).
    if (!isCid(view, at.src_cid, this.#cid)) return this.#drop('from an address that is not its own');
    if (!isCid(view, at.dst_cid, HOST_CID)) return this.#drop('to an address that is not the host');
    let length = view.getUint16(at.op, true) === abi.VIRTIO_VSOCK_OP_RW ? view.getUint32(at.len, true) : 0;
    if (length > available) return this.#drop(`of ${length} bytes in a buffer of ${available}`);
    if (length > MAX_PAYLOAD) {
      this.#warn(`vsock: the guest sent a packet of ${length} bytes; its connection is reset`);
      view.setUint16(at.op, abi.VIRTIO_VSOCK_OP_INVALID, true); // the host side resets it for that
      length = 0;
    }
    view.setUint32(at.len, length, true);
    const payload = this.#payload as Segments;
    payload.cut(readable, HEADER_SIZE, length);
    return this.#channel.send(this.#io, bytes, payload) !== 'full';
  }

  #drop(what: string): true {
    this.#warn(`vsock: the guest sent a packet ${what}; dropped`);
    return true;
  }

  /** As many packets as there are buffers at most. */
  #receive(): void {
    const queue = this.#queues[RECEIVE];
    if (!queue || this.#transportReset || this.#heardAt !== undefined) return;
    for (;;) {
      const packet = this.#waiting ?? this.#channel.receive();
      if (!packet) {
        this.#channel.awaitReadable();
        break;
      }
      const done = this.#deliver(queue, packet);
      this.#waiting = done ? undefined : packet;
      if (!done) break;
    }
    queue.publish();
  }

  /** Gives the guest a packet, or as many as its buffers need. @returns false when there are not enough buffers yet. */
  #deliver(queue: Virtqueue, packet: Uint8Array): boolean {
    const { bytes, view } = this.#received;
    const length = packet.length - HEADER_SIZE;
    bytes.set(packet.subarray(0, HEADER_SIZE));
    for (;;) {
      const chain = queue.pop();
      if (!chain) return false;
      const { writable } = chain;
      const part = Math.min(length - this.#delivered, writable.length - HEADER_SIZE);
      if (part < 0 || (part === 0 && length > 0)) {
        this.#warn(`vsock: the guest gave a receive buffer of ${writable.length} bytes; it is of no use`);
        queue.push(chain, 0);
        continue;
      }
      view.setUint32(at.len, part, true);
      writable.write(0, bytes);
      const start = HEADER_SIZE + this.#delivered;
      if (part > 0) writable.write(HEADER_SIZE, packet.subarray(start, start + part));
      this.#delivered += part;
      queue.push(chain, HEADER_SIZE + part);
      if (this.#delivered < length) continue;
      this.#delivered = 0;
      return true;
    }
  }

  #sendEvent(): void {
    const queue = this.#queues[EVENT];
    if (!this.#transportReset || !queue) return;
    const chain = queue.pop();
    if (!chain) return;
    const event = new Uint8Array(abi.virtio_vsock_event.sizeof); // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0
    queue.push(chain, chain.writable.write(0, event));
    this.#transportReset = false;
    // Once it has given back the event's buffer, and those of events before that it has not read.
    this.#heardAt = ((this.#heardAt ?? queue.awaitNext()) + 1) & 0xffff;
    queue.publish();
  }
}

function headerBytes() {
  const bytes = new Uint8Array(HEADER_SIZE);
  return { bytes, view: new DataView(bytes.buffer) };
}

function isCid(header: DataView, offset: number, cid: number): boolean {
  return header.getUint32(offset, true) === cid && header.getUint32(offset + 4, true) === 0;
}
