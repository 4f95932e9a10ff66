import * as abi from '../generated/virtio.js';

/** Requests address the disk in these units, whatever its block size (virtio 1.2 section 5.2.6). */
export const SECTOR = 512;

/** Most ranges of one discard or write-zeroes request. */
export const MAX_RANGES = 16;
/** Sectors of each: what the host does as one operation. Where it has to write zeros itself that takes time. */
export const MAX_DISCARD_SECTORS = 2 ** 30 / SECTOR;
export const MAX_WRITE_ZEROES_SECTORS = (64 * 2 ** 20) / SECTOR;

export interface Geometry {
  /** Bytes. */
  readonly size: number;
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  /** Most data buffers of a request. */
  readonly segments: number;
}

/** The configuration space (section 5.2.4), but for `writeback`, which is 0. */
export function configSpace({ size, blockSize, physicalBlockSize, segments }: Geometry): Uint8Array {
  const { virtio_blk_config: field } = abi;
  const bytes = new Uint8Array(field.sizeof);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(field.capacity, BigInt(size / SECTOR), true);
  view.setUint32(field.seg_max, segments, true);
  view.setUint32(field.blk_size, blockSize, true);
  const ratio = physicalBlockSize / blockSize;
  bytes[field.physical_block_exp] = Math.log2(ratio);
  view.setUint16(field.min_io_size, ratio, true);
  view.setUint32(field.max_discard_sectors, MAX_DISCARD_SECTORS, true);
  view.setUint32(field.max_discard_seg, MAX_RANGES, true);
  view.setUint32(field.discard_sector_alignment, physicalBlockSize / SECTOR, true);
  view.setUint32(field.max_write_zeroes_sectors, MAX_WRITE_ZEROES_SECTORS, true);
  view.setUint32(field.max_write_zeroes_seg, MAX_RANGES, true);
  bytes[field.write_zeroes_may_unmap] = 1;
  return bytes;
}
