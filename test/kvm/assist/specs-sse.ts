import type { Spec } from './case.js';

type Row = [kind: string, opcode: number];

const packed = (map: readonly number[], prefix: Spec['prefix'], rows: readonly Row[]): Spec[] =>
  rows.map(([kind, opcode]) => {
    const opcodes = [...map, opcode];
    return { kind, opcode: opcodes, width: 16, align: 16, vectorRm: true, ...(prefix ? { prefix } : {}) };
  });

const ONE = [0x0f];
const TWO = [0x0f, 0x38];
const THREE = [0x0f, 0x3a];

const plain: Row[] = [
  ['unpcklps', 0x14],
  ['unpckhps', 0x15],
  ['andps', 0x54],
  ['andnps', 0x55],
  ['orps', 0x56],
  ['xorps', 0x57],
];

const integer: Row[] = [
  ['unpcklpd', 0x14],
  ['unpckhpd', 0x15],
  ['andpd', 0x54],
  ['andnpd', 0x55],
  ['orpd', 0x56],
  ['xorpd', 0x57],
  ['punpcklbw', 0x60],
  ['punpcklwd', 0x61],
  ['punpckldq', 0x62],
  ['packsswb', 0x63],
  ['pcmpgtb', 0x64],
  ['pcmpgtw', 0x65],
  ['pcmpgtd', 0x66],
  ['packuswb', 0x67],
  ['punpckhbw', 0x68],
  ['punpckhwd', 0x69],
  ['punpckhdq', 0x6a],
  ['packssdw', 0x6b],
  ['punpcklqdq', 0x6c],
  ['punpckhqdq', 0x6d],
  ['pcmpeqb', 0x74],
  ['pcmpeqw', 0x75],
  ['pcmpeqd', 0x76],
  ['psrlw', 0xd1],
  ['psrld', 0xd2],
  ['psrlq', 0xd3],
  ['paddq', 0xd4],
  ['pmullw', 0xd5],
  ['psubusb', 0xd8],
  ['psubusw', 0xd9],
  ['pminub', 0xda],
  ['pand', 0xdb],
  ['paddusb', 0xdc],
  ['paddusw', 0xdd],
  ['pmaxub', 0xde],
  ['pandn', 0xdf],
  ['pavgb', 0xe0],
  ['psraw', 0xe1],
  ['psrad', 0xe2],
  ['pavgw', 0xe3],
  ['pmulhuw', 0xe4],
  ['pmulhw', 0xe5],
  ['psubsb', 0xe8],
  ['psubsw', 0xe9],
  ['pminsw', 0xea],
  ['por', 0xeb],
  ['paddsb', 0xec],
  ['paddsw', 0xed],
  ['pmaxsw', 0xee],
  ['pxor', 0xef],
  ['psllw', 0xf1],
  ['pslld', 0xf2],
  ['psllq', 0xf3],
  ['pmuludq', 0xf4],
  ['pmaddwd', 0xf5],
  ['psadbw', 0xf6],
  ['psubb', 0xf8],
  ['psubw', 0xf9],
  ['psubd', 0xfa],
  ['psubq', 0xfb],
  ['paddb', 0xfc],
  ['paddw', 0xfd],
  ['paddd', 0xfe],
];

const supplemental: Row[] = [
  ['pshufb', 0x00],
  ['phaddw', 0x01],
  ['phaddd', 0x02],
  ['phaddsw', 0x03],
  ['pmaddubsw', 0x04],
  ['phsubw', 0x05],
  ['phsubd', 0x06],
  ['phsubsw', 0x07],
  ['psignb', 0x08],
  ['psignw', 0x09],
  ['psignd', 0x0a],
  ['pmulhrsw', 0x0b],
  ['pabsb', 0x1c],
  ['pabsw', 0x1d],
  ['pabsd', 0x1e],
  ['pcmpeqq', 0x29],
  ['packusdw', 0x2b],
  ['pminsb', 0x38],
  ['pminsd', 0x39],
  ['pminuw', 0x3a],
  ['pminud', 0x3b],
  ['pmaxsb', 0x3c],
  ['pmaxsd', 0x3d],
  ['pmaxuw', 0x3e],
  ['pmaxud', 0x3f],
  ['pmulld', 0x40],
];

const withImmediate = (spec: Spec): Spec => ({ ...spec, immediate: true });

/** Shifts by an immediate: 0F 71, 72 and 73 with the operation in ModRM.reg. */
const shiftGroups: Spec[] = [
  ['psrlw', 0x71, 2],
  ['psraw', 0x71, 4],
  ['psllw', 0x71, 6],
  ['psrld', 0x72, 2],
  ['psrad', 0x72, 4],
  ['pslld', 0x72, 6],
  ['psrlq', 0x73, 2],
  ['psrldq', 0x73, 3],
  ['psllq', 0x73, 6],
  ['pslldq', 0x73, 7],
].map(([kind, opcode, extension]) => {
  const numbers = { opcode: [0x0f, opcode as number], extension: extension as number };
  return { kind: kind as string, prefix: 0x66, ...numbers, form: 'register', immediate: true };
});

/** kind, opcode, prefix, bytes of the memory operand, the rest. */
type MoveRow = [string, number, Spec['prefix'] | 0, number, Partial<Spec>?];

const STORE = { writes: true };
const MEMORY = { form: 'memory' } as const;
const ALIGNED = { align: 16 };

const moves: MoveRow[] = [
  ['movups', 0x10, 0, 16],
  ['movups', 0x10, 0x66, 16],
  ['movss', 0x10, 0xf3, 4],
  ['movsd', 0x10, 0xf2, 8],
  ['movups', 0x11, 0, 16, STORE],
  ['movss', 0x11, 0xf3, 4, STORE],
  ['movsd', 0x11, 0xf2, 8, STORE],
  ['movhlps', 0x12, 0, 8],
  ['movlpd', 0x12, 0x66, 8, MEMORY],
  ['movsldup', 0x12, 0xf3, 16, ALIGNED],
  ['movddup', 0x12, 0xf2, 8],
  ['movlps', 0x13, 0, 8, { ...MEMORY, ...STORE }],
  ['movhps', 0x16, 0, 8],
  ['movhpd', 0x16, 0x66, 8, MEMORY],
  ['movshdup', 0x16, 0xf3, 16, ALIGNED],
  ['movhps', 0x17, 0, 8, { ...MEMORY, ...STORE }],
  ['movaps', 0x28, 0, 16, ALIGNED],
  ['movaps', 0x29, 0x66, 16, { ...ALIGNED, ...STORE }],
  ['movntps', 0x2b, 0, 16, { ...ALIGNED, ...MEMORY, ...STORE }],
  ['movdqa', 0x6f, 0x66, 16, ALIGNED],
  ['movdqu', 0x6f, 0xf3, 16],
  ['movq', 0x7e, 0xf3, 8],
  ['movdqa', 0x7f, 0x66, 16, { ...ALIGNED, ...STORE }],
  ['movdqu', 0x7f, 0xf3, 16, STORE],
  ['movq', 0xd6, 0x66, 8, STORE],
  ['movntdq', 0xe7, 0x66, 16, { ...ALIGNED, ...MEMORY, ...STORE }],
  ['lddqu', 0xf0, 0xf2, 16, MEMORY],
];

const REGISTER = { form: 'register' } as const;

/** Between vector and general registers. */
const transfers: Spec[] = [
  { kind: 'movd', prefix: 0x66, opcode: [0x0f, 0x6e], sizes: [4, 8] },
  { kind: 'movd', prefix: 0x66, opcode: [0x0f, 0x7e], sizes: [4, 8], writes: true },
  { kind: 'pmovmskb', prefix: 0x66, opcode: [0x0f, 0xd7], ...REGISTER },
  { kind: 'movmskps', opcode: [0x0f, 0x50], ...REGISTER },
  { kind: 'movmskpd', prefix: 0x66, opcode: [0x0f, 0x50], ...REGISTER },
  { kind: 'pextrw', prefix: 0x66, opcode: [0x0f, 0xc5], immediate: true, ...REGISTER },
  { kind: 'pinsrw', prefix: 0x66, opcode: [0x0f, 0xc4], immediate: true, width: 2 },
  { kind: 'pinsrb', prefix: 0x66, opcode: [...THREE, 0x20], immediate: true, width: 1 },
  { kind: 'pinsrd', prefix: 0x66, opcode: [...THREE, 0x22], immediate: true, sizes: [4, 8] },
  { kind: 'pextrb', prefix: 0x66, opcode: [...THREE, 0x14], immediate: true, width: 1, writes: true },
  { kind: 'pextrw', prefix: 0x66, opcode: [...THREE, 0x15], immediate: true, width: 2, writes: true },
  { kind: 'pextrd', prefix: 0x66, opcode: [...THREE, 0x16], immediate: true, sizes: [4, 8], writes: true },
];

export const sseSpecs: readonly Spec[] = [
  ...packed(ONE, undefined, plain),
  ...packed(ONE, 0x66, integer),
  ...packed(TWO, 0x66, supplemental),
  ...packed(ONE, 0x66, [['pshufd', 0x70]]).map(withImmediate),
  ...packed(ONE, 0xf3, [['pshufhw', 0x70]]).map(withImmediate),
  ...packed(ONE, 0xf2, [['pshuflw', 0x70]]).map(withImmediate),
  ...packed(ONE, undefined, [['shufps', 0xc6]]).map(withImmediate),
  ...packed(ONE, 0x66, [['shufpd', 0xc6]]).map(withImmediate),
  ...packed(THREE, 0x66, [
    ['palignr', 0x0f],
    ['pclmulqdq', 0x44],
  ]).map(withImmediate),
  ...shiftGroups,
  ...moves.map(([kind, opcode, prefix, width, rest]): Spec => {
    return { kind, opcode: [0x0f, opcode], width, vectorRm: true, ...(prefix ? { prefix } : {}), ...rest };
  }),
  ...transfers,
];
