import { constants } from 'node:os';
import { PENDING } from '../../backends/disk/disk.js';
import type { IoRequest } from '../../backends/guest-io.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { DescriptorChain } from '../chain.js';
import * as abi from '../generated/virtio.js';
import type { Virtqueue } from '../queue.js';
import { Segments } from '../segments.js';
import type { Blk } from './blk.js';
import { MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS, SECTOR } from './config-space.js';

const { ECANCELED } = constants.errno;
const { VIRTIO_BLK_S_OK: OK, VIRTIO_BLK_S_IOERR: IOERR, VIRTIO_BLK_S_UNSUPP: UNSUPP } = abi;
const HEADER = abi.virtio_blk_outhdr;
const RANGE = abi.virtio_blk_discard_write_zeroes;

/** Only used while a request is looked at. */
const headerBytes = new Uint8Array(HEADER.sizeof);
const header = new DataView(headerBytes.buffer);
const statusByte = new Uint8Array(1);

/** One request of the driver from its chain to its status (virtio 1.2 section 5.2.6). Reused. */
export class BlkRequest implements IoRequest {
  readonly #device: Blk;
  readonly #queue: Virtqueue;
  readonly #data: Segments;
  #chain: DescriptorChain | undefined;
  #type = 0;
  #sector = 0;
  /** Copies of the ranges of a discard or write-zeroes request. */
  #ranges: DataView | undefined;
  /** Operations of the disk that the request takes, and how many have begun; then perhaps a flush. */
  #operations = 0;
  #begun = 0;
  #flush = false;
  /** Data bytes written for the driver, from the first on. */
  #filled = 0;

  constructor(device: Blk, queue: Virtqueue, memory: GuestMemory) {
    this.#device = device;
    this.#queue = queue;
    this.#data = new Segments(memory);
  }

  /** Does what the chain asks for, now or with the disk's time. */
  begin(chain: DescriptorChain): void {
    this.#chain = chain;
    this.#operations = this.#begun = this.#filled = 0;
    this.#flush = false;
    // The status is the last writable byte; where there is none the driver learns nothing.
    if (chain.writable.length === 0) {
      this.#give(chain, 0);
      return;
    }
    const status = this.#prepare(chain);
    if (status !== OK) this.#complete(chain, status);
    else if (this.#goOn(0)) this.#device.began();
  }

  /** The disk is through with an operation of it. */
  ioDone(result: number): void {
    if (!this.#goOn(result)) this.#device.ended();
  }

  /** Reads the header, once, and checks the request. @returns OK, or the status that it fails with. */
  #prepare({ readable, writable }: DescriptorChain): number {
    if (readable.read(0, headerBytes) < HEADER.sizeof) return IOERR;
    this.#type = header.getUint32(HEADER.type, true);
    this.#sector = sectorAt(header, HEADER.sector);
    const { disk, id } = this.#device;
    switch (this.#type) {
      case abi.VIRTIO_BLK_T_IN:
        this.#data.cut(writable, 0, writable.length - 1);
        return this.#prepareMove();
      case abi.VIRTIO_BLK_T_OUT:
        if (disk.readOnly) return IOERR;
        this.#data.cut(readable, HEADER.sizeof, readable.length - HEADER.sizeof);
        this.#flush = this.#device.writeThrough;
        return this.#prepareMove();
      case abi.VIRTIO_BLK_T_FLUSH:
        this.#flush = true;
        return OK;
      case abi.VIRTIO_BLK_T_GET_ID:
        this.#data.cut(writable, 0, writable.length - 1);
        this.#filled = this.#data.write(0, id);
        return OK;
      case abi.VIRTIO_BLK_T_DISCARD:
      case abi.VIRTIO_BLK_T_WRITE_ZEROES:
        if (disk.readOnly) return IOERR;
        this.#flush = this.#device.writeThrough;
        return this.#prepareRanges(readable);
      default:
        return UNSUPP;
    }
  }

  #prepareMove(): number {
    const { length } = this.#data;
    if (length % SECTOR !== 0 || !this.#onDisk(this.#sector, length / SECTOR)) return IOERR;
    this.#operations = 1;
    return OK;
  }

  /** Section 5.2.6.2; every range is checked before the first is touched. */
  #prepareRanges(readable: Segments): number {
    const discard = this.#type === abi.VIRTIO_BLK_T_DISCARD;
    const [bit, most] = discard
      ? [abi.VIRTIO_BLK_F_DISCARD, MAX_DISCARD_SECTORS]
      : [abi.VIRTIO_BLK_F_WRITE_ZEROES, MAX_WRITE_ZEROES_SECTORS];
    if (!this.#device.accepted(bit)) return UNSUPP;
    const length = readable.length - HEADER.sizeof;
    if (length === 0 || length % RANGE.sizeof !== 0 || length > MAX_RANGES * RANGE.sizeof) return IOERR;
    this.#ranges ??= new DataView(new ArrayBuffer(MAX_RANGES * RANGE.sizeof));
    readable.read(HEADER.sizeof, new Uint8Array(this.#ranges.buffer, 0, length));
    for (let at = 0; at < length; at += RANGE.sizeof) {
      const flags = this.#ranges.getUint32(at + RANGE.flags, true);
      if (flags & (discard ? ~0 : ~abi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)) return UNSUPP;
    }
    for (let at = 0; at < length; at += RANGE.sizeof) {
      const sectors = this.#ranges.getUint32(at + RANGE.num_sectors, true);
      if (sectors > most || !this.#onDisk(sectorAt(this.#ranges, at + RANGE.sector), sectors)) return IOERR;
    }
    this.#operations = length / RANGE.sizeof;
    return OK;
  }

  #onDisk(sector: number, count: number): boolean {
    return sector <= this.#device.disk.size / SECTOR - count;
  }

  /** Goes on to what is left to do, or completes. @returns whether the disk is at work. */
  #goOn(result: number): boolean {
    let outcome = result;
    while (outcome === 0 && this.#queue.alive && (this.#begun < this.#operations || this.#flush)) {
      outcome = this.#begun < this.#operations ? this.#operate(this.#begun++) : this.#flushDisk();
    }
    if (outcome === PENDING) return true;
    if (outcome < 0 && outcome !== -ECANCELED) this.#device.failed(this.#describe(), -outcome);
    if (outcome === 0) this.#count();
    this.#complete(this.#chain as DescriptorChain, outcome === 0 ? OK : IOERR);
    return false;
  }

  #count(): void {
    const { counters } = this.#device;
    if (this.#type === abi.VIRTIO_BLK_T_IN) {
      this.#filled = this.#data.length;
      counters.reads++;
      counters.readBytes += this.#data.length;
    } else if (this.#type === abi.VIRTIO_BLK_T_OUT) {
      counters.writes++;
      counters.writtenBytes += this.#data.length;
    } else if (this.#type === abi.VIRTIO_BLK_T_FLUSH) {
      counters.flushes++;
    }
  }

  #operate(index: number): number {
    const { disk } = this.#device;
    if (this.#type === abi.VIRTIO_BLK_T_IN) return disk.read(this.#sector * SECTOR, this.#data, this);
    if (this.#type === abi.VIRTIO_BLK_T_OUT) return disk.write(this.#sector * SECTOR, this.#data, this);
    const ranges = this.#ranges as DataView;
    const at = index * RANGE.sizeof;
    const offset = sectorAt(ranges, at + RANGE.sector) * SECTOR;
    const length = ranges.getUint32(at + RANGE.num_sectors, true) * SECTOR;
    if (length === 0) return 0;
    if (this.#type === abi.VIRTIO_BLK_T_DISCARD) return disk.discard(offset, length, this);
    const unmap = (ranges.getUint32(at + RANGE.flags, true) & abi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) !== 0;
    return disk.zero(offset, length, unmap, this);
  }

  #flushDisk(): number {
    this.#flush = false;
    return this.#device.disk.flush(this);
  }

  #complete(chain: DescriptorChain, status: number): void {
    const { writable } = chain;
    if (!this.#queue.alive) return; // that memory is no longer the device's
    statusByte[0] = status;
    writable.write(writable.length - 1, statusByte);
    this.#give(chain, this.#filled === writable.length - 1 ? writable.length : this.#filled);
  }

  #give(chain: DescriptorChain, written: number): void {
    this.#chain = undefined;
    this.#queue.push(chain, written);
    this.#device.recycle(this);
  }

  #describe(): string {
    if (this.#type === abi.VIRTIO_BLK_T_IN) return `reading ${this.#data.length} bytes at ${this.#sector * SECTOR}`;
    if (this.#type === abi.VIRTIO_BLK_T_OUT) return `writing ${this.#data.length} bytes at ${this.#sector * SECTOR}`;
    if (this.#type === abi.VIRTIO_BLK_T_FLUSH) return 'flushing';
    return this.#type === abi.VIRTIO_BLK_T_DISCARD ? 'discarding' : 'writing zeroes';
  }
}

/** A 64-bit sector number; above 2^53 it is not exact, nor on any disk. */
function sectorAt(view: DataView, offset: number): number {
  return view.getUint32(offset + 4, true) * 2 ** 32 + view.getUint32(offset, true);
}
