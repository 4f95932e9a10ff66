import { decompress } from 'fzstd';
import { xxh64 } from './xxh64.js';

const MAGIC = 0xfd2fb528;
const BLOCK_RLE = 1;
const BLOCK_RESERVED = 3;
const CHECKSUM_SIZE = 4;

/** Unpacks one Zstandard frame that fills `out` and returns its length. Throws Error for data that is not valid. */
export function decodeZstd(input: Uint8Array, out: Uint8Array): number {
  // fzstd starts each frame at the beginning of the buffer again and allocates for each, so that it must see just one.
  const { end, checksum } = parseFrame(input);
  if (end !== input.length) throw new Error(`the frame has ${end} bytes of ${input.length}`);
  decompress(input, out);
  // Neither the checksum nor that the frame fills the buffer, and no more, is checked by fzstd: this checks both.
  if (checksum !== undefined && BigInt(checksum) !== BigInt.asUintN(32, xxh64(out))) {
    throw new Error('the checksum of the data is wrong');
  }
  return out.length;
}

/** Where the first frame ends and its checksum, if it has one (RFC 8878 sections 3.1.1.1 and 3.1.1.2). */
function parseFrame(input: Uint8Array): { end: number; checksum: number | undefined } {
  const view = new DataView(input.buffer, input.byteOffset, input.byteLength);
  if (view.getUint32(0, true) !== MAGIC) throw new Error('the magic number is wrong');
  const descriptor = view.getUint8(4);
  const singleSegment = (descriptor >> 5) & 1;
  const hasChecksum = (descriptor >> 2) & 1;
  const dictionaryIdSize = [0, 1, 2, 4][descriptor & 3] as number;
  const contentSizeSize = [singleSegment, 2, 4, 8][descriptor >> 6] as number;
  let at = 5 + (1 - singleSegment) + dictionaryIdSize + contentSizeSize;
  for (let last = false; !last; ) {
    const header = view.getUint16(at, true) | (view.getUint8(at + 2) << 16);
    last = (header & 1) === 1;
    const type = (header >> 1) & 3;
    if (type === BLOCK_RESERVED) throw new Error('a block is of a reserved type');
    at += 3 + (type === BLOCK_RLE ? 1 : header >> 3);
  }
  if (!hasChecksum) return { end: at, checksum: undefined };
  return { end: at + CHECKSUM_SIZE, checksum: view.getUint32(at, true) };
}
