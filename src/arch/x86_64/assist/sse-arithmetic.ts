import { prefix } from './instruction.js';
import { type LaneOperation, lanewise, lanewise64, pack, saturate, shuffle, unpack } from './vector-lanes.js';

// What the packed-integer instructions compute (SDM 2A and 2B, each one's page). XMM forms only.

const equal = (a: number, b: number) => (a === b ? -1 : 0);
const greater = (a: number, b: number) => (a > b ? -1 : 0);
const average = (a: number, b: number) => (a + b + 1) >> 1;
const sign = (a: number, b: number) => (b === 0 ? 0 : b < 0 ? -a : a);

/** Sums or differences of neighbours, destination pairs first. */
function horizontal(lanes: 'i16' | 'i32', operation: (a: number, b: number) => number): LaneOperation {
  return (d, s) => {
    const all = [...d[lanes], ...s[lanes]];
    for (let i = 0; i < d[lanes].length; i++) d[lanes][i] = operation(all[2 * i] as number, all[2 * i + 1] as number);
  };
}

/** Products of neighbouring lanes, added up. */
const maddwd: LaneOperation = (d, s) => {
  const [a, b] = [d.i16.slice(), s.i16.slice()];
  const product = (i: number) => (a[i] as number) * (b[i] as number);
  for (let i = 0; i < 4; i++) d.i32[i] = product(2 * i) + product(2 * i + 1);
};

const maddubsw: LaneOperation = (d, s) => {
  const [a, b] = [d.u8.slice(), s.i8.slice()];
  const product = (i: number) => (a[i] as number) * (b[i] as number);
  for (let i = 0; i < 8; i++) d.i16[i] = saturate.i16(product(2 * i) + product(2 * i + 1));
};

const sumOfDifferences: LaneOperation = (d, s) => {
  const [a, b] = [d.u8.slice(), s.u8.slice()];
  for (let half = 0; half < 2; half++) {
    let sum = 0;
    for (let i = half * 8; i < half * 8 + 8; i++) sum += Math.abs((a[i] as number) - (b[i] as number));
    d.u64[half] = BigInt(sum);
  }
};

const shuffleBytes: LaneOperation = (d, s) => {
  const before = d.u8.slice();
  for (let i = 0; i < 16; i++) {
    const index = s.u8[i] as number;
    d.u8[i] = index & 0x80 ? 0 : (before[index & 15] as number);
  }
};

const alignRight: LaneOperation = (d, s, immediate) => {
  const both = [...s.u8, ...d.u8];
  for (let i = 0; i < 16; i++) d.u8[i] = both[i + immediate] ?? 0;
};

const shufps: LaneOperation = (d, s, immediate) => {
  const [a, b] = [d.u32.slice(), s.u32.slice()];
  for (let i = 0; i < 4; i++) d.u32[i] = (i < 2 ? a : b)[(immediate >> (2 * i)) & 3] as number;
};

const shufpd: LaneOperation = (d, s, immediate) => {
  const [a, b] = [d.u64.slice(), s.u64.slice()];
  d.u64[0] = a[immediate & 1] as bigint;
  d.u64[1] = b[(immediate >> 1) & 1] as bigint;
};

/** PCLMULQDQ: a product without carries. */
const carryLess: LaneOperation = (d, s, immediate) => {
  const a = d.u64[immediate & 1] as bigint;
  const b = s.u64[(immediate >> 4) & 1] as bigint;
  let product = 0n;
  for (let i = 0n; i < 64n; i++) if ((b >> i) & 1n) product ^= a << i;
  d.u64[0] = product & 0xffff_ffff_ffff_ffffn;
  d.u64[1] = product >> 64n;
};

const and = lanewise64((a, b) => a & b);
const andNot = lanewise64((a, b) => ~a & b);
const or = lanewise64((a, b) => a | b);
const xor = lanewise64((a, b) => a ^ b);

/** After 0F with 66. */
export const packed66: Record<number, [name: string, operation: LaneOperation]> = {
  20: ['unpcklpd', unpack(8, false)],
  21: ['unpckhpd', unpack(8, true)],
  84: ['andpd', and],
  85: ['andnpd', andNot],
  86: ['orpd', or],
  87: ['xorpd', xor],
  96: ['punpcklbw', unpack(1, false)],
  97: ['punpcklwd', unpack(2, false)],
  98: ['punpckldq', unpack(4, false)],
  99: ['packsswb', pack('i16', 'i8')],
  100: ['pcmpgtb', lanewise('i8', greater)],
  101: ['pcmpgtw', lanewise('i16', greater)],
  102: ['pcmpgtd', lanewise('i32', greater)],
  103: ['packuswb', pack('i16', 'u8')],
  104: ['punpckhbw', unpack(1, true)],
  105: ['punpckhwd', unpack(2, true)],
  106: ['punpckhdq', unpack(4, true)],
  107: ['packssdw', pack('i32', 'i16')],
  108: ['punpcklqdq', unpack(8, false)],
  109: ['punpckhqdq', unpack(8, true)],
  116: ['pcmpeqb', lanewise('u8', equal)],
  117: ['pcmpeqw', lanewise('u16', equal)],
  118: ['pcmpeqd', lanewise('u32', equal)],
  212: ['paddq', lanewise64((a, b) => a + b)],
  213: ['pmullw', lanewise('i16', (a, b) => a * b)],
  216: ['psubusb', lanewise('u8', (a, b) => saturate.u8(a - b))],
  217: ['psubusw', lanewise('u16', (a, b) => saturate.u16(a - b))],
  218: ['pminub', lanewise('u8', Math.min)],
  219: ['pand', and],
  220: ['paddusb', lanewise('u8', (a, b) => saturate.u8(a + b))],
  221: ['paddusw', lanewise('u16', (a, b) => saturate.u16(a + b))],
  222: ['pmaxub', lanewise('u8', Math.max)],
  223: ['pandn', andNot],
  224: ['pavgb', lanewise('u8', average)],
  227: ['pavgw', lanewise('u16', average)],
  228: ['pmulhuw', lanewise('u16', (a, b) => (a * b) / 0x10000)],
  229: ['pmulhw', lanewise('i16', (a, b) => (a * b) >> 16)],
  232: ['psubsb', lanewise('i8', (a, b) => saturate.i8(a - b))],
  233: ['psubsw', lanewise('i16', (a, b) => saturate.i16(a - b))],
  234: ['pminsw', lanewise('i16', Math.min)],
  235: ['por', or],
  236: ['paddsb', lanewise('i8', (a, b) => saturate.i8(a + b))],
  237: ['paddsw', lanewise('i16', (a, b) => saturate.i16(a + b))],
  238: ['pmaxsw', lanewise('i16', Math.max)],
  239: ['pxor', xor],
  244: ['pmuludq', lanewise64((a, b) => (a & 0xffff_ffffn) * (b & 0xffff_ffffn))],
  245: ['pmaddwd', maddwd],
  246: ['psadbw', sumOfDifferences],
  248: ['psubb', lanewise('u8', (a, b) => a - b)],
  249: ['psubw', lanewise('u16', (a, b) => a - b)],
  250: ['psubd', lanewise('u32', (a, b) => a - b)],
  251: ['psubq', lanewise64((a, b) => a - b)],
  252: ['paddb', lanewise('u8', (a, b) => a + b)],
  253: ['paddw', lanewise('u16', (a, b) => a + b)],
  254: ['paddd', lanewise('u32', (a, b) => a + b)],
};

/** After 0F without a prefix. */
export const packedPlain: Record<number, [name: string, operation: LaneOperation]> = {
  20: ['unpcklps', unpack(4, false)],
  21: ['unpckhps', unpack(4, true)],
  84: ['andps', and],
  85: ['andnps', andNot],
  86: ['orps', or],
  87: ['xorps', xor],
};

/** After 0F 38 with 66: SSSE3, and the SSE4 ones that hashing uses. */
export const packed38: Record<number, [name: string, operation: LaneOperation]> = {
  0: ['pshufb', shuffleBytes],
  1: ['phaddw', horizontal('i16', (a, b) => a + b)],
  2: ['phaddd', horizontal('i32', (a, b) => a + b)],
  3: ['phaddsw', horizontal('i16', (a, b) => saturate.i16(a + b))],
  4: ['pmaddubsw', maddubsw],
  5: ['phsubw', horizontal('i16', (a, b) => a - b)],
  6: ['phsubd', horizontal('i32', (a, b) => a - b)],
  7: ['phsubsw', horizontal('i16', (a, b) => saturate.i16(a - b))],
  8: ['psignb', lanewise('i8', sign)],
  9: ['psignw', lanewise('i16', sign)],
  10: ['psignd', lanewise('i32', sign)],
  11: ['pmulhrsw', lanewise('i16', (a, b) => (((a * b) >> 14) + 1) >> 1)],
  28: ['pabsb', lanewise('i8', (_, b) => Math.abs(b))],
  29: ['pabsw', lanewise('i16', (_, b) => Math.abs(b))],
  30: ['pabsd', lanewise('i32', (_, b) => Math.abs(b))],
  41: ['pcmpeqq', lanewise64((a, b) => (a === b ? 0xffff_ffff_ffff_ffffn : 0n))],
  43: ['packusdw', pack('i32', 'u16')],
  56: ['pminsb', lanewise('i8', Math.min)],
  57: ['pminsd', lanewise('i32', Math.min)],
  58: ['pminuw', lanewise('u16', Math.min)],
  59: ['pminud', lanewise('u32', Math.min)],
  60: ['pmaxsb', lanewise('i8', Math.max)],
  61: ['pmaxsd', lanewise('i32', Math.max)],
  62: ['pmaxuw', lanewise('u16', Math.max)],
  63: ['pmaxud', lanewise('u32', Math.max)],
  64: ['pmulld', lanewise('i32', Math.imul)],
};

const { NONE, P66, PF2, PF3 } = prefix;

/** Those with an immediate byte. */
export const packedImmediate: [name: string, map: 1 | 3, opcode: number, mandatory: number, LaneOperation][] = [
  ['pshufd', 1, 0x70, P66, shuffle('u32', 0)],
  ['pshufhw', 1, 0x70, PF3, shuffle('u16', 4)],
  ['pshuflw', 1, 0x70, PF2, shuffle('u16', 0)],
  ['shufps', 1, 0xc6, NONE, shufps],
  ['shufpd', 1, 0xc6, P66, shufpd],
  ['palignr', 3, 0x0f, P66, alignRight],
  ['pclmulqdq', 3, 0x44, P66, carryLess],
];
