import type { Disk } from '../../backends/disk/disk.js';
import type { DeviceState } from '../../bus/bus.js';
import { errnoName, SnapshotError } from '../../errors.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { StateReader } from '../../state-reader.js';
import { feature, type VirtioContext, type VirtioModel } from '../device.js';
import * as abi from '../generated/virtio.js';
import type { Virtqueue } from '../queue.js';
import { configSpace } from './config-space.js';
import { BlkRequest } from './request.js';

/** Descriptors of the queue. */
const QUEUE_SIZE = 256;
/** Without indirect descriptors a request's header and status take two. */
const DATA_SEGMENTS = QUEUE_SIZE - 2;

const COMMON_FEATURES = [
  abi.VIRTIO_BLK_F_SEG_MAX,
  abi.VIRTIO_BLK_F_BLK_SIZE,
  abi.VIRTIO_BLK_F_TOPOLOGY,
  abi.VIRTIO_BLK_F_FLUSH,
];
const READ_ONLY_FEATURES = [abi.VIRTIO_BLK_F_RO];
const WRITABLE_FEATURES = [abi.VIRTIO_BLK_F_CONFIG_WCE, abi.VIRTIO_BLK_F_DISCARD, abi.VIRTIO_BLK_F_WRITE_ZEROES];

const CONFIG_WCE = feature(abi.VIRTIO_BLK_F_CONFIG_WCE);
const FLUSH = feature(abi.VIRTIO_BLK_F_FLUSH);

export interface BlkOptions {
  /** For messages. */
  readonly name: string;
  readonly disk: Disk;
  /** Serial number, at most 20 ASCII characters. */
  readonly id: string;
  /** Keeps the vCPUs from running until the function that it returns is called. */
  readonly holdVcpus: () => () => void;
  /** The host could not do what a request asked for. A guest can cause that as often as it likes. */
  readonly failed: (message: string) => void;
}

/** What a drive did; bytes are those of completed requests. */
export class BlkCounters {
  reads = 0;
  readBytes = 0;
  writes = 0;
  writtenBytes = 0;
  flushes = 0;
  /** Requests that the host could not serve. */
  errors = 0;
}

/**
 * Block device (virtio 1.2 section 5.2) of one queue. Requests are served in any order, as many at a time as the queue
 * holds; their data goes between the disk and guest memory without a copy.
 */
export class Blk implements VirtioModel {
  readonly name: string;
  readonly type = abi.VIRTIO_ID_BLOCK;
  readonly queueSizes = [QUEUE_SIZE];
  readonly features: bigint;
  readonly counters = new BlkCounters();
  readonly disk: Disk;
  readonly id: Uint8Array;
  readonly #config: Uint8Array;
  readonly #holdVcpus: () => () => void;
  readonly #onFailed: (message: string) => void;
  #queue: Virtqueue | undefined;
  #memory: GuestMemory | undefined;
  /** Negotiated: what the driver may count on. */
  #accepted = 0n;
  /** The configuration field: whether completed writes may wait for a flush to be durable. */
  #writeback = true;
  /** Requests not in use. */
  #free: BlkRequest[] = [];
  /** Requests that the disk works on, also those of before a reset. */
  #inFlight = 0;
  #releaseVcpus: (() => void) | undefined;

  constructor({ name, disk, id, holdVcpus, failed }: BlkOptions) {
    this.name = name;
    this.disk = disk;
    this.id = new Uint8Array(abi.VIRTIO_BLK_ID_BYTES);
    this.id.set(Buffer.from(id, 'latin1').subarray(0, abi.VIRTIO_BLK_ID_BYTES));
    const { size, blockSize, physicalBlockSize } = disk;
    this.#config = configSpace({ size, blockSize, physicalBlockSize, segments: DATA_SEGMENTS });
    this.features = [...COMMON_FEATURES, ...(disk.readOnly ? READ_ONLY_FEATURES : WRITABLE_FEATURES)]
      .map(feature)
      .reduce((all, bit) => all | bit);
    this.#holdVcpus = holdVcpus;
    this.#onFailed = failed;
  }

  /** Every set will do; but `writeback` depends on it, and may be read from now on (section 5.2.5.2). */
  acceptsFeatures(features: bigint): boolean {
    this.#accepted = features;
    this.#writeback = (features & FLUSH) !== 0n;
    return true;
  }

  readConfig(offset: number, out: Uint8Array): void {
    this.#config[abi.virtio_blk_config.wce] = this.#writeback ? 1 : 0;
    out.set(this.#config.subarray(offset, offset + out.length));
  }

  writeConfig(offset: number, data: Uint8Array): void {
    if (offset === abi.virtio_blk_config.wce && data.length === 1 && this.accepted(abi.VIRTIO_BLK_F_CONFIG_WCE)) {
      this.#writeback = data[0] !== 0;
    }
  }

  activate({ memory, features, queues }: VirtioContext): void {
    this.#memory = memory;
    this.#accepted = features;
    this.#queue = queues[0];
    this.#free = [];
  }

  handleQueue(): void {
    const queue = this.#queue;
    const memory = this.#memory;
    if (!queue || !memory) return;
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      const request = this.#free.pop() ?? new BlkRequest(this, queue, memory);
      request.begin(chain);
    }
    queue.publish();
  }

  /** Requests have been completed since: GuestIo's onBatch. */
  publish(): void {
    this.#queue?.publish();
  }

  reset(): void {
    this.#queue = this.#memory = undefined;
    this.#accepted = 0n;
    this.#writeback = true;
    if (this.#inFlight === 0 || this.#releaseVcpus) return;
    // The guest may use that memory for something else as soon as it runs.
    this.#releaseVcpus = this.#holdVcpus();
    this.disk.cancel();
  }

  save(): DeviceState {
    return { writeback: this.#writeback, size: this.disk.size };
  }

  restore(state: StateReader): void {
    this.#writeback = state.boolean('writeback');
    const size = state.number('size', 0, Number.MAX_SAFE_INTEGER);
    if (size === this.disk.size) return;
    const { name, disk } = this;
    throw new SnapshotError(
      `snapshot: ${name}: ${disk.path} has ${disk.size} bytes, but the guest’s disk had ${size}; give the file that it had`,
    );
  }

  /** Whether a feature was negotiated. */
  accepted(bit: number): boolean {
    return (this.#accepted & feature(bit)) !== 0n;
  }

  /** Whether a write must be durable before it is completed (section 5.2.6.2). */
  get writeThrough(): boolean {
    return this.#accepted & CONFIG_WCE ? !this.#writeback : !(this.#accepted & FLUSH);
  }

  /** The disk works on one more request. */
  began(): void {
    this.#inFlight++;
  }

  /** The disk is through with a request. */
  ended(): void {
    this.#inFlight--;
    if (this.#inFlight > 0 || !this.#releaseVcpus) return;
    this.#releaseVcpus();
    this.#releaseVcpus = undefined;
  }

  /** A request is completed. */
  recycle(request: BlkRequest): void {
    this.#free.push(request);
  }

  /** The host could not do what a request asked for. */
  failed(what: string, errno: number): void {
    this.counters.errors++;
    this.#onFailed(`${this.name} (${this.disk.path}): ${what} failed with ${errnoName(errno)}`);
  }
}
