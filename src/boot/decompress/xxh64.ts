// XXH64 with seed 0 (xxHash's doc/xxhash_spec.md), of which a Zstandard frame ends with the low 32 bits (RFC 8878 section
// 3.1.1). The four lanes over the bulk of the data are computed in 32-bit halves, since BigInt takes seconds; the rest is
// little, and in BigInt.
const P1 = 0x9e3779b185ebca87n;
const P2 = 0xc2b2ae3d27d4eb4fn;
const P3 = 0x165667b19e3779f9n;
const P4 = 0x85ebca77c2b2ae63n;
const P5 = 0x27d4eb2f165667c5n;
const STRIPE = 32;

export function xxh64(bytes: Uint8Array): bigint {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const bulk = bytes.length - (bytes.length % STRIPE);
  let hash = P5;
  if (bulk > 0) {
    const lanes = [u64(P1 + P2), P2, 0n, u64(-P1)].map((start, i) => lane(view, 8 * i, bulk, start));
    hash = [1n, 7n, 12n, 18n].reduce((sum, count, i) => u64(sum + rotate(lanes[i] as bigint, count)), 0n);
    for (const value of lanes) hash = u64((hash ^ round(value)) * P1 + P4);
  }
  hash = u64(hash + BigInt(bytes.length));
  let at = bulk;
  for (; at + 8 <= bytes.length; at += 8) {
    hash = u64(rotate(hash ^ round(view.getBigUint64(at, true)), 27n) * P1 + P4);
  }
  if (at + 4 <= bytes.length) {
    hash = u64(rotate(hash ^ u64(BigInt(view.getUint32(at, true)) * P1), 23n) * P2 + P3);
    at += 4;
  }
  for (; at < bytes.length; at++) hash = u64(rotate(hash ^ u64(BigInt(view.getUint8(at)) * P5), 11n) * P1);
  hash = u64((hash ^ (hash >> 33n)) * P2);
  hash = u64((hash ^ (hash >> 29n)) * P3);
  return hash ^ (hash >> 32n);
}

function u64(value: bigint): bigint {
  return BigInt.asUintN(64, value);
}

function rotate(value: bigint, count: bigint): bigint {
  return u64(value << count) | (value >> (64n - count));
}

function round(input: bigint): bigint {
  return u64(rotate(u64(input * P2), 31n) * P1);
}

const [P1_HIGH, P1_LOW] = [Number(P1 >> 32n), Number(P1 & 0xffffffffn)];
const [P2_HIGH, P2_LOW] = [Number(P2 >> 32n), Number(P2 & 0xffffffffn)];

/** One accumulator over every fourth word: acc = rotate(acc + word * P2, 31) * P1. */
function lane(view: DataView, from: number, end: number, start: bigint): bigint {
  let high = Number(start >> 32n);
  let low = Number(start & 0xffffffffn);
  for (let at = from; at < end; at += STRIPE) {
    const wordLow = view.getUint32(at, true);
    const wordHigh = view.getUint32(at + 4, true);
    const sum = low + (Math.imul(wordLow, P2_LOW) >>> 0);
    const sumHigh =
      high +
      highProduct(wordLow, P2_LOW) +
      Math.imul(wordLow, P2_HIGH) +
      Math.imul(wordHigh, P2_LOW) +
      (sum > 0xffffffff ? 1 : 0);
    const turnedHigh = ((sumHigh << 31) | ((sum | 0) >>> 1)) >>> 0;
    const turnedLow = ((sum << 31) | ((sumHigh | 0) >>> 1)) >>> 0;
    low = Math.imul(turnedLow, P1_LOW) >>> 0;
    high = (highProduct(turnedLow, P1_LOW) + Math.imul(turnedLow, P1_HIGH) + Math.imul(turnedHigh, P1_LOW)) >>> 0;
  }
  return (BigInt(high) << 32n) | BigInt(low);
}

/** The upper half of the product of two uint32. */
function highProduct(a: number, b: number): number {
  const [aLow, aHigh, bLow, bHigh] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const middle2 = aLow * bHigh + (middle & 0xffff);
  return aHigh * bHigh + (middle >>> 16) + (middle2 >>> 16);
}
