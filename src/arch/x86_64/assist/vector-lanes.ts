/**
 * A 16-byte value seen in lanes of every width, over one buffer. Typed arrays have the host's byte order, which is the
 * guest's: both are x86.
 */
export class Lanes {
  readonly u8 = new Uint8Array(16);
  readonly i8 = new Int8Array(this.u8.buffer);
  readonly u16 = new Uint16Array(this.u8.buffer);
  readonly i16 = new Int16Array(this.u8.buffer);
  readonly u32 = new Uint32Array(this.u8.buffer);
  readonly i32 = new Int32Array(this.u8.buffer);
  readonly u64 = new BigUint64Array(this.u8.buffer);
}

/** Computes destination lanes from the old destination `d` and the source `s`, in place in `d`. */
export type LaneOperation = (d: Lanes, s: Lanes, immediate: number) => void;

type NumberLanes = 'u8' | 'i8' | 'u16' | 'i16' | 'u32' | 'i32';

/** Each lane from the two lanes in its place; what does not fit wraps. */
export function lanewise(lanes: NumberLanes, operation: (a: number, b: number) => number): LaneOperation {
  return (d, s) => {
    const [to, from] = [d[lanes], s[lanes]];
    for (let i = 0; i < to.length; i++) to[i] = operation(to[i] as number, from[i] as number);
  };
}

export function lanewise64(operation: (a: bigint, b: bigint) => bigint): LaneOperation {
  return (d, s) => {
    for (let i = 0; i < 2; i++) d.u64[i] = operation(d.u64[i] as bigint, s.u64[i] as bigint);
  };
}

export const clamp = (low: number, high: number) => (value: number) => Math.min(high, Math.max(low, value));
export const saturate = {
  i8: clamp(-0x80, 0x7f),
  u8: clamp(0, 0xff),
  i16: clamp(-0x8000, 0x7fff),
  u16: clamp(0, 0xffff),
} as const;

/** Interleaves lanes of `bytes` bytes from the low or high halves of both. */
export function unpack(bytes: number, high: boolean): LaneOperation {
  return (d, s) => {
    const [a, b] = [d.u8.slice(), s.u8.slice()];
    const from = high ? 8 : 0;
    for (let i = 0; i < 8; i += bytes) {
      d.u8.set(a.subarray(from + i, from + i + bytes), 2 * i);
      d.u8.set(b.subarray(from + i, from + i + bytes), 2 * i + bytes);
    }
  };
}

/** Narrows the lanes of both, destination first. */
export function pack(from: 'i16' | 'i32', to: 'i8' | 'u8' | 'i16' | 'u16'): LaneOperation {
  return (d, s) => {
    const wide = [...d[from], ...s[from]];
    for (let i = 0; i < wide.length; i++) d[to][i] = saturate[to](wide[i] as number);
  };
}

/** Lanes of `source` picked by two immediate bits each. `base` is the first of the four lanes. */
export function shuffle(lanes: 'u16' | 'u32', base: number): LaneOperation {
  return (d, s, immediate) => {
    const before = s[lanes].slice();
    d.u8.set(s.u8);
    for (let i = 0; i < 4; i++) d[lanes][base + i] = before[base + ((immediate >> (2 * i)) & 3)] as number;
  };
}

/** A shift of every lane by one count; counts from the lane's width up give 0, or the sign for `arithmetic`. */
export function shift(bits: 16 | 32 | 64, kind: 'left' | 'right' | 'arithmetic'): (d: Lanes, count: bigint) => void {
  return (d, count) => {
    if (bits === 64) {
      for (let i = 0; i < 2; i++) {
        const value = d.u64[i] as bigint;
        d.u64[i] = count > 63n ? 0n : kind === 'left' ? value << count : value >> count;
      }
      return;
    }
    const by = Number(count > BigInt(bits) ? BigInt(bits) : count);
    const signed = bits === 16 ? d.i16 : d.i32;
    const unsigned = bits === 16 ? d.u16 : d.u32;
    for (let i = 0; i < signed.length; i++) {
      if (kind === 'arithmetic') signed[i] = (signed[i] as number) >> Math.min(by, bits - 1);
      else if (by >= bits) unsigned[i] = 0;
      else unsigned[i] = kind === 'left' ? (unsigned[i] as number) << by : (unsigned[i] as number) >>> by;
    }
  };
}
