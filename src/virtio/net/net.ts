import type { GuestIo } from '../../backends/guest-io.js';
import type { DeviceState } from '../../bus/bus.js';
import type { OneShotTimer } from '../../devices/host.js';
import type { StateReader } from '../../state-reader.js';
import type { DescriptorChain } from '../chain.js';
import { feature, type VirtioContext, type VirtioModel } from '../device.js';
import * as abi from '../generated/virtio.js';
import type { Virtqueue } from '../queue.js';
import { Segments } from '../segments.js';
import { type NetBackend, Offload } from './backend.js';
import {
  checkReceiveHeader,
  checkTransmitHeader,
  ETHERNET_HEADER,
  HEADER_SIZE,
  isWhole,
  MAX_FRAME,
  setBufferCount,
} from './header.js';

const RECEIVE = 0;
const QUEUE_SIZE = 256;
/** Frames received in a row; then the vCPU and the other descriptors have their turn. */
const BATCH = QUEUE_SIZE;
/** An IEEE 802.1Q tag does not count as part of the packet. */
const VLAN_TAG = 4;

/** The features that each offload stands for: what the guest leaves to the host, and the host to the guest. */
const OFFLOAD_FEATURES = [
  [Offload.checksum, abi.VIRTIO_NET_F_CSUM, abi.VIRTIO_NET_F_GUEST_CSUM],
  [Offload.tso4, abi.VIRTIO_NET_F_HOST_TSO4, abi.VIRTIO_NET_F_GUEST_TSO4],
  [Offload.tso6, abi.VIRTIO_NET_F_HOST_TSO6, abi.VIRTIO_NET_F_GUEST_TSO6],
  [Offload.ecn, abi.VIRTIO_NET_F_HOST_ECN, abi.VIRTIO_NET_F_GUEST_ECN],
] as const;

/** A feature and those of which it requires one (virtio 1.2 section 5.1.3.1). */
const REQUIREMENTS = [
  [abi.VIRTIO_NET_F_GUEST_TSO4, abi.VIRTIO_NET_F_GUEST_CSUM],
  [abi.VIRTIO_NET_F_GUEST_TSO6, abi.VIRTIO_NET_F_GUEST_CSUM],
  [abi.VIRTIO_NET_F_GUEST_ECN, abi.VIRTIO_NET_F_GUEST_TSO4, abi.VIRTIO_NET_F_GUEST_TSO6],
  [abi.VIRTIO_NET_F_HOST_TSO4, abi.VIRTIO_NET_F_CSUM],
  [abi.VIRTIO_NET_F_HOST_TSO6, abi.VIRTIO_NET_F_CSUM],
  [abi.VIRTIO_NET_F_HOST_ECN, abi.VIRTIO_NET_F_HOST_TSO4, abi.VIRTIO_NET_F_HOST_TSO6],
].map(([bit, ...others]) => [feature(bit as number), others.reduce((set, b) => set | feature(b), 0n)] as const);

export interface NetOptions {
  /** For messages. */
  readonly name: string;
  /** Six bytes. */
  readonly mac: Uint8Array;
  readonly backend: NetBackend;
  readonly io: GuestIo;
  readonly timer: (onExpired: () => void) => OneShotTimer;
}

/** What went through a device, and what it dropped. Bytes are of Ethernet frames. */
export class NetCounters {
  sentFrames = 0;
  sentBytes = 0;
  /** Dropped on the way out: shorter than an Ethernet header, longer than MAX_FRAME, a header that asks for too much. */
  sentTooShort = 0;
  sentTooLong = 0;
  sentBadHeader = 0;
  /** The backend did not want it. */
  sentRefused = 0;
  receivedFrames = 0;
  receivedBytes = 0;
  /** Dropped on the way in: more than the guest's buffers or its link hold, an offload that the driver did not accept. */
  receivedTooLong = 0;
  receivedBadHeader = 0;
}

/**
 * Network device (virtio 1.2 section 5.1) with one pair of queues. Frames that the guest sends wait in its queue while
 * the backend is full; frames for it wait in the backend while it gives no buffers, all but one.
 */
export class Net implements VirtioModel {
  readonly name: string;
  readonly type = abi.VIRTIO_ID_NET;
  readonly queueSizes = [QUEUE_SIZE, QUEUE_SIZE];
  readonly features: bigint;
  readonly counters = new NetCounters();
  readonly #backend: NetBackend;
  readonly #io: GuestIo;
  readonly #config = new Uint8Array(abi.virtio_net_config.mtu + 2);
  /** Comes back through the run loop after a batch. */
  readonly #next: OneShotTimer;
  readonly #header = new Uint8Array(HEADER_SIZE);
  /** Buffers for the frame that is delivered. */
  readonly #chains: DescriptorChain[] = [];
  #frame: Segments | undefined;
  #receiveQueue: Virtqueue | undefined;
  #transmitQueue: Virtqueue | undefined;
  #changed: () => void = () => {};
  #mergeable = false;
  #maxReceived = MAX_FRAME;
  /** Offloads that the guest may ask for, and that it may be asked for. */
  #sendOffloads = 0;
  #receiveOffloads = 0;
  /** The frame that found no buffers: nothing is read after it until they are there. */
  #waiting: Uint8Array | undefined;
  /** The backend was full: it says when it is not. */
  #full = false;

  constructor({ name, mac, backend, io, timer }: NetOptions) {
    this.name = name;
    this.#backend = backend;
    this.#io = io;
    this.features = offeredFeatures(backend);
    const config = new DataView(this.#config.buffer);
    this.#config.set(mac, abi.virtio_net_config.mac);
    config.setUint16(abi.virtio_net_config.status, backend.up ? abi.VIRTIO_NET_S_LINK_UP : 0, true);
    config.setUint16(abi.virtio_net_config.max_virtqueue_pairs, 1, true);
    config.setUint16(abi.virtio_net_config.mtu, backend.mtu ?? 0, true);
    this.#next = timer(() => this.#receive());
    backend.onReadable = () => this.#receive();
    backend.onWritable = () => {
      this.#full = false;
      this.#transmit();
    };
    backend.onDown = () => {
      this.#config[abi.virtio_net_config.status] = 0;
      this.#changed();
      this.#full = false;
      this.#transmit(); // to nowhere: every request is to be completed
    };
  }

  acceptsFeatures(features: bigint): boolean {
    return REQUIREMENTS.every(([bit, others]) => !(features & bit) || (features & others) !== 0n);
  }

  readConfig(offset: number, out: Uint8Array): void {
    out.set(this.#config.subarray(offset, offset + out.length));
  }

  activate({ memory, queues, features, configChanged }: VirtioContext): void {
    const has = (bit: number) => (features & feature(bit)) !== 0n;
    for (const [offload, host, guest] of OFFLOAD_FEATURES) {
      if (has(host)) this.#sendOffloads |= offload;
      if (has(guest)) this.#receiveOffloads |= offload;
    }
    this.#mergeable = has(abi.VIRTIO_NET_F_MRG_RXBUF);
    const { mtu } = this.#backend;
    this.#maxReceived = mtu !== undefined && has(abi.VIRTIO_NET_F_MTU) ? ETHERNET_HEADER + VLAN_TAG + mtu : MAX_FRAME;
    this.#frame = new Segments(memory);
    this.#changed = configChanged;
    [this.#receiveQueue, this.#transmitQueue] = queues;
    this.#backend.setOffloads(this.#receiveOffloads);
    this.#next.arm(1); // there may be frames already
  }

  handleQueue(index: number): void {
    if (index !== RECEIVE) this.#transmit();
    else if (this.#waiting) this.#receive();
  }

  reset(): void {
    this.#receiveQueue = this.#transmitQueue = undefined;
    this.#changed = () => {};
    this.#waiting = undefined;
    this.#sendOffloads = this.#receiveOffloads = 0;
    this.#backend.setOffloads(0);
  }

  /** The frame that waits for buffers is lost, as on any network. */
  save(): DeviceState {
    return { up: this.#up };
  }

  /** The guest hears when the link is not as it was. */
  restore(state: StateReader): void {
    if (state.boolean('up') !== this.#up) this.#changed();
  }

  get #up(): boolean {
    return this.#config[abi.virtio_net_config.status] !== 0;
  }

  /** A queue's worth of frames at most: what is pushed is the driver's only when it is published. */
  #transmit(): void {
    const queue = this.#transmitQueue;
    if (!queue || this.#full) return;
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      if (!this.#send(chain)) {
        queue.unpop(chain);
        this.#full = true;
        this.#backend.awaitWritable();
        break;
      }
      queue.push(chain, 0);
    }
    queue.publish();
  }

  /** @returns false when the backend is full. */
  #send({ readable }: DescriptorChain): boolean {
    const { counters } = this;
    const length = readable.length - HEADER_SIZE;
    if (length < ETHERNET_HEADER) {
      counters.sentTooShort++;
    } else if (length > MAX_FRAME) {
      counters.sentTooLong++;
    } else {
      readable.read(0, this.#header);
      if (!checkTransmitHeader(this.#header, length, this.#sendOffloads)) {
        counters.sentBadHeader++;
        return true;
      }
      const frame = this.#frame as Segments;
      frame.cut(readable, HEADER_SIZE, length);
      const result = this.#backend.send(this.#io, this.#header, frame);
      if (result === 'full') return false;
      if (result === 'taken') {
        counters.sentFrames++;
        counters.sentBytes += length;
      } else {
        counters.sentRefused++;
      }
    }
    return true;
  }

  #receive(): void {
    const queue = this.#receiveQueue;
    if (!queue) return;
    for (let count = 0; ; count++) {
      if (count === BATCH) {
        this.#next.arm(1);
        break;
      }
      const frame = this.#waiting ?? this.#backend.receive();
      if (!frame) {
        this.#backend.awaitReadable();
        break;
      }
      const done = this.#deliver(queue, frame);
      this.#waiting = done ? undefined : frame;
      if (!done) break;
    }
    queue.publish();
  }

  /** @returns false when there are not enough buffers yet. */
  #deliver(queue: Virtqueue, frame: Uint8Array): boolean {
    const length = frame.length - HEADER_SIZE;
    if (!checkReceiveHeader(frame, this.#receiveOffloads)) {
      this.counters.receivedBadHeader++;
      return true;
    }
    if (length > MAX_FRAME || (length > this.#maxReceived && isWhole(frame))) {
      this.counters.receivedTooLong++;
      return true;
    }
    const chains = this.#chains;
    const limit = this.#mergeable ? queue.size : 1;
    let room = 0;
    while (room < frame.length) {
      // More than a whole ring would have to hold: waiting for more does not help.
      const chain = chains.length < limit ? queue.pop() : undefined;
      if (!chain) {
        const never = chains.length === limit;
        while (chains.length > 0) queue.unpop(chains.pop() as DescriptorChain);
        if (never) this.counters.receivedTooLong++;
        return never;
      }
      chains.push(chain);
      room += chain.writable.length;
    }
    setBufferCount(frame, chains.length);
    let done = 0;
    for (const chain of chains) {
      const part = chains.length === 1 ? frame : frame.subarray(done, done + chain.writable.length);
      done += part.length;
      chain.writable.write(0, part);
      queue.push(chain, part.length);
    }
    chains.length = 0;
    this.counters.receivedFrames++;
    this.counters.receivedBytes += length;
    return true;
  }
}

function offeredFeatures({ offloads, mtu }: NetBackend): bigint {
  let features = feature(abi.VIRTIO_NET_F_MAC) | feature(abi.VIRTIO_NET_F_STATUS) | feature(abi.VIRTIO_NET_F_MRG_RXBUF);
  if (mtu !== undefined) features |= feature(abi.VIRTIO_NET_F_MTU);
  for (const [offload, host, guest] of OFFLOAD_FEATURES) {
    if (offloads & offload) features |= feature(host) | feature(guest);
  }
  return features;
}
