// The LZ4 legacy frame, which `lz4 -l` makes for the kernel (lz4_Frame_format.md, "Legacy frame"): the magic, then blocks
// of at most 8 MiB, each after its compressed size and independent of the others. Blocks: lz4_Block_format.md.
const MAGIC = 0x184c2102;
const MAX_BLOCK = 8 << 20;
const MIN_MATCH = 4;
// Below this a loop is cheaper than the call that copies.
const COPY_THRESHOLD = 32;

/** Unpacks a legacy LZ4 frame into `out` and returns how many bytes it made. Throws Error for data that is not valid. */
export function decodeLz4Legacy(input: Uint8Array, out: Uint8Array): number {
  const view = new DataView(input.buffer, input.byteOffset, input.byteLength);
  let made = 0;
  for (let at = 0; at < input.length; ) {
    if (at + 4 > input.length) throw new Error('the last block header is cut off');
    const size = view.getUint32(at, true);
    at += 4;
    if (size === MAGIC) continue; // at the start, and between frames put one after the other
    if (size === 0 || at + size > input.length) throw new Error(`a block of ${size} bytes runs past the end`);
    made = decodeBlock(input, at, at + size, out, made);
    at += size;
  }
  return made;
}

function decodeBlock(input: Uint8Array, from: number, end: number, out: Uint8Array, blockStart: number): number {
  let at = from;
  let made = blockStart;
  const limit = Math.min(out.length, blockStart + MAX_BLOCK);
  // Lengths of 15 and more go on in bytes up to and with the first that is not 255.
  const longLength = (nibble: number): number => {
    let length = nibble;
    for (let byte = 255; byte === 255; length += byte) {
      if (at >= end) throw new Error('a length is cut off');
      byte = input[at++] as number;
    }
    return length;
  };
  while (at < end) {
    const token = input[at++] as number;
    let literals = token >> 4;
    if (literals === 15) literals = longLength(literals);
    if (at + literals > end || made + literals > limit) throw new Error('literals run past the end');
    if (literals < COPY_THRESHOLD) for (let i = 0; i < literals; i++) out[made + i] = input[at + i] as number;
    else out.set(input.subarray(at, at + literals), made);
    at += literals;
    made += literals;
    if (at === end) break; // a block ends with literals

    if (at + 2 > end) throw new Error('a match is cut off');
    const offset = (input[at] as number) | ((input[at + 1] as number) << 8);
    at += 2;
    let length = token & 15;
    if (length === 15) length = longLength(length);
    length += MIN_MATCH;
    const source = made - offset;
    if (offset === 0 || source < blockStart) throw new Error('a match reaches before the block');
    if (made + length > limit) throw new Error('a match runs past the end');
    if (offset >= length && length >= COPY_THRESHOLD) out.copyWithin(made, source, source + length);
    else for (let i = 0; i < length; i++) out[made + i] = out[source + i] as number; // may overlap: byte by byte
    made += length;
  }
  return made;
}
