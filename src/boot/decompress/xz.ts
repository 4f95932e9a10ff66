import { undoX86Filter } from './bcj-x86.js';
import { crc32 } from './crc32.js';
import { Lzma2Decoder } from './lzma2.js';

// The .xz file format 1.2.1. The kernel's payload has one block, CRC32 as its check, and the filters x86 and LZMA2.
const HEADER_SIZE = 12;
const CHECK_NONE = 0;
const CHECK_CRC32 = 1;
const FILTER_X86 = 0x04;
const FILTER_LZMA2 = 0x21;

/**
 * Unpacks a .xz stream into `out` and returns how many bytes it made. Throws Error for data that is not valid or needs
 * another check than none or CRC32, or another filter than x86 and LZMA2. The index after the blocks is not read.
 */
export function decodeXz(input: Uint8Array, out: Uint8Array): number {
  const view = new DataView(input.buffer, input.byteOffset, input.byteLength);
  if (input.length < HEADER_SIZE) throw new Error('the stream header is cut off');
  // Section 2.1.1.2: stream flags, and 2.1.1.3: their CRC32.
  const check = view.getUint8(7);
  if (crc32(input.subarray(6, 8)) !== view.getUint32(8, true)) throw new Error('the stream header is damaged');
  if (check !== CHECK_NONE && check !== CHECK_CRC32) throw new Error(`integrity check ${check} is not supported`);
  const lzma2 = new Lzma2Decoder(input, out);
  let at = HEADER_SIZE;
  let made = 0;
  for (;;) {
    if (at >= input.length) throw new Error('the index is missing');
    const sizeByte = view.getUint8(at);
    if (sizeByte === 0) return made; // section 4.1: index indicator
    const headerSize = (sizeByte + 1) * 4;
    const { x86Start } = readBlockHeader(input.subarray(at, at + headerSize), headerSize);
    at += headerSize;

    const block = lzma2.decode(at, made);
    const bytes = out.subarray(made, block.outputEnd);
    if (x86Start !== undefined) undoX86Filter(bytes, x86Start);
    // Section 3.3: padding to a multiple of four, and 3.4: the check.
    at = (block.inputEnd + 3) & ~3;
    if (check === CHECK_CRC32) {
      if (at + 4 > input.length) throw new Error('the check is cut off');
      if (crc32(bytes) !== view.getUint32(at, true)) throw new Error('the CRC32 of the data is wrong');
      at += 4;
    }
    made = block.outputEnd;
  }
}

/** Section 3.1. Returns the start offset of the x86 filter, if the block has one. */
function readBlockHeader(header: Uint8Array, size: number): { x86Start: number | undefined } {
  if (header.length < size) throw new Error('a block header is cut off');
  const view = new DataView(header.buffer, header.byteOffset, header.byteLength);
  const fieldsEnd = size - 4;
  if (crc32(header.subarray(0, fieldsEnd)) !== view.getUint32(fieldsEnd, true)) {
    throw new Error('a block header is damaged');
  }
  const flags = view.getUint8(1);
  if (flags & 0x3c) throw new Error('a block has unknown flags');
  let at = 2;
  // Section 1.2: seven bits a byte, least significant first. None here has a use for more than 35 bits.
  const integer = (): number => {
    let value = 0;
    for (let i = 0; i < 5; i++) {
      const byte = header[at++];
      if (byte === undefined || at > fieldsEnd) break;
      value += (byte & 0x7f) * 2 ** (7 * i);
      if (byte < 0x80) return value;
    }
    throw new Error('a block header has a bad integer');
  };
  if (flags & 0x40) integer(); // compressed size
  if (flags & 0x80) integer(); // uncompressed size
  const filters = Array.from({ length: (flags & 3) + 1 }, () => {
    const id = integer();
    const propertiesSize = integer();
    const properties = header.subarray(at, at + propertiesSize);
    at += propertiesSize;
    return { id, properties };
  });
  if (at > fieldsEnd || filters.pop()?.id !== FILTER_LZMA2) throw new Error('a block is not LZMA2');
  const branch = filters.pop();
  if (filters.length > 0 || (branch && branch.id !== FILTER_X86)) {
    throw new Error('a block has a filter other than x86 and LZMA2');
  }
  // Section 5.3.2: properties are empty, or the start offset.
  const p = branch?.properties;
  return { x86Start: p && (p.length === 4 ? new DataView(p.buffer, p.byteOffset).getUint32(0, true) : 0) };
}
