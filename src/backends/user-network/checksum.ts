import { u16 } from './bytes.js';

/** Below this many bytes setting up a view costs more than it saves. */
const WORD_MINIMUM = 96;

let wordsOf: ArrayBufferLike | undefined;
let words: Uint32Array = new Uint32Array(0);

/**
 * The ones' complement sum (RFC 1071) of bytes [start, end), folded to 16 bits; the first byte is the high one of its
 * pair, and an odd last byte is padded with zero.
 */
export function sum16(bytes: Uint8Array, start: number, end: number): number {
  let sum = 0;
  if (end - start < WORD_MINIMUM) {
    let at = start;
    for (; at + 1 < end; at += 2) sum += u16(bytes, at);
    if (at < end) sum += (bytes[at] as number) << 8;
    return fold(sum);
  }
  // The aligned middle is summed in little-endian words, which differ from the big-endian sum by a swap of the result.
  const lead = (4 - ((bytes.byteOffset + start) & 3)) & 3;
  const middle = start + lead;
  const middleEnd = middle + ((end - middle) & ~3);
  const little = sumWords(bytes, middle, middleEnd);
  sum = lead & 1 ? little : swap(little);
  for (let at = start; at < middle; at++) sum += (at - start) & 1 ? (bytes[at] as number) : (bytes[at] as number) << 8;
  for (let at = middleEnd; at < end; at++) sum += (at - start) & 1 ? (bytes[at] as number) : (bytes[at] as number) << 8;
  return fold(sum);
}

function sumWords(bytes: Uint8Array, start: number, end: number): number {
  if (bytes.buffer !== wordsOf) {
    wordsOf = bytes.buffer;
    words = new Uint32Array(wordsOf, 0, wordsOf.byteLength >>> 2);
  }
  const view = words;
  const last = (bytes.byteOffset + end) >>> 2;
  let at = (bytes.byteOffset + start) >>> 2;
  // Doubles are exact to 2^53 and a frame has fewer than 2^15 words. Four sums, so that additions need not wait.
  let a = 0;
  let b = 0;
  let c = 0;
  let d = 0;
  for (; at + 3 < last; at += 4) {
    a += view[at] as number;
    b += view[at + 1] as number;
    c += view[at + 2] as number;
    d += view[at + 3] as number;
  }
  for (; at < last; at++) a += view[at] as number;
  const sum = a + b + c + d;
  const low = sum >>> 0;
  const high = (sum - low) / 0x1_0000_0000;
  return fold((low & 0xffff) + (low >>> 16) + (high & 0xffff) + (high >>> 16));
}

function swap(value: number): number {
  return ((value & 0xff) << 8) | (value >>> 8);
}

/** A sum below 2^32 as 16 bits with end-around carry. */
export function fold(sum: number): number {
  let folded = (sum & 0xffff) + (sum >>> 16);
  folded = (folded & 0xffff) + (folded >>> 16);
  return folded;
}

/** The sum of the pseudo-header of TCP and UDP (RFC 9293 section 3.1). */
export function pseudoHeaderSum(source: number, destination: number, protocol: number, length: number): number {
  return fold(
    (source >>> 16) + (source & 0xffff) + (destination >>> 16) + (destination & 0xffff) + protocol + (length & 0xffff),
  );
}
