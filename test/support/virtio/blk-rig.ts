import type { Disk } from '#dist/backends/disk/disk.js';
import { openDrives } from '#dist/backends/disk/open-drives.js';
import { GuestIo } from '#dist/backends/guest-io.js';
import { addon, READY } from '#dist/kvm/addon.js';
import { FdEvents } from '#dist/machine/fd-events.js';
import { Blk } from '#dist/virtio/blk/blk.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { type Buffer, type Completion, type DriverOptions, MockDriver, mockMemory } from './mock-driver.js';

export const SECTOR = 512;
export const { VIRTIO_BLK_S_OK: OK, VIRTIO_BLK_S_IOERR: IOERR, VIRTIO_BLK_S_UNSUPP: UNSUPP } = abi;

/** What openDrives() takes, every default filled in. */
export function source(file: string, options: Partial<Parameters<typeof openDrives>[0][number]> = {}) {
  return { file, readOnly: false, cache: 'writeback' as const, overlay: undefined, ...options };
}

export function openDrive(file: string, options: Parameters<typeof source>[1] = {}): Disk {
  return openDrives([source(file, options)])[0] as Disk;
}

/** A request's first 16 bytes. */
export function header(type: number, sector: number | bigint = 0): Uint8Array {
  const bytes = new Uint8Array(abi.virtio_blk_outhdr.sizeof);
  const view = new DataView(bytes.buffer);
  view.setUint32(abi.virtio_blk_outhdr.type, type, true);
  view.setBigUint64(abi.virtio_blk_outhdr.sector, BigInt(sector), true);
  return bytes;
}

/** One range of a discard or write-zeroes request. */
export function range(sector: number | bigint, sectors: number, flags = 0): Uint8Array {
  const bytes = new Uint8Array(abi.virtio_blk_discard_write_zeroes.sizeof);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(sector), true);
  view.setUint32(8, sectors, true);
  view.setUint32(12, flags, true);
  return bytes;
}

/** The status byte of a completed request. */
export function statusOf(completion: Completion | undefined): number | undefined {
  return completion?.data.at(-1);
}

/** A block device with a driver, on real memory and real native I/O; nothing of KVM. */
export class BlkRig {
  readonly disk: Disk;
  readonly driver: MockDriver;
  readonly blk: Blk;
  readonly io: GuestIo;
  readonly warnings: string[] = [];
  /** How often the vCPUs are held now. */
  holds = 0;
  readonly #runHost = new addon.RunHost();
  readonly #events = new FdEvents(this.#runHost);

  /** @param options null for a driver that is not initialized yet. */
  constructor(disk: Disk, options: DriverOptions | null = {}, memorySize = 32 << 20) {
    this.disk = disk;
    const { mapping, memory } = mockMemory(memorySize);
    this.io = new GuestIo([[0, mapping]], memory, this.#events);
    disk.attach(this.io, memory);
    this.blk = new Blk({
      name: 'blk0',
      disk,
      id: 'serial-7',
      holdVcpus: () => {
        this.holds++;
        return () => this.holds--;
      },
      failed: (message) => this.warnings.push(message),
    });
    this.io.onBatch(() => this.blk.publish());
    this.driver = new MockDriver(this.blk, memory);
    if (options) this.driver.initialize(options);
  }

  get queue() {
    const queue = this.driver.queues[0];
    if (!queue) throw new Error('the driver has no queue');
    return queue;
  }

  /** Lets native I/O come to its end. */
  pump(): void {
    while (this.io.pending > 0) this.pumpOnce();
  }

  pumpOnce(): void {
    const event = this.#runHost.next();
    if (event < READY) throw new Error(`next() returned ${event}`);
    this.#events.dispatch(event & 0xffff);
  }

  /** Makes requests, all in one go, and waits for them. @returns in the order in which they were made. */
  requests(all: readonly (readonly Buffer[])[]): Completion[] {
    const heads = all.map((buffers) => this.queue.add(buffers));
    this.queue.notify();
    this.pump();
    const done = this.queue.completions();
    if (done.length !== all.length) throw new Error(`${done.length} of ${all.length} requests were completed`);
    return heads.map((head) => done.find((one) => one.head === head) as Completion);
  }

  request(...buffers: Buffer[]): Completion {
    return this.requests([buffers])[0] as Completion;
  }

  read(sector: number | bigint, length: number): { status: number | undefined; data: Uint8Array; written: number } {
    const done = this.request(header(abi.VIRTIO_BLK_T_IN, sector), length, 1);
    return { status: statusOf(done), data: done.data.subarray(0, length), written: done.written };
  }

  write(sector: number | bigint, data: Uint8Array): number | undefined {
    return statusOf(this.request(header(abi.VIRTIO_BLK_T_OUT, sector), data, 1));
  }

  flush(): number | undefined {
    return statusOf(this.request(header(abi.VIRTIO_BLK_T_FLUSH), 1));
  }

  discard(...ranges: Uint8Array[]): number | undefined {
    return statusOf(this.request(header(abi.VIRTIO_BLK_T_DISCARD), ...ranges, 1));
  }

  zero(...ranges: Uint8Array[]): number | undefined {
    return statusOf(this.request(header(abi.VIRTIO_BLK_T_WRITE_ZEROES), ...ranges, 1));
  }

  /** The end of this power-on; the disk stays open. */
  powerOff(): void {
    this.io[Symbol.dispose]();
    this.#runHost.close();
  }

  close(): void {
    this.powerOff();
    this.disk.close();
  }
}
