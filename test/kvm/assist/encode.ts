/** A memory operand as ModRM and SIB encode it (SDM 2A 2.1.5). Register numbers 0 to 15; RSP is no index. */
export interface MemoryOperand {
  readonly base?: number;
  readonly index?: number;
  /** Power of two. */
  readonly scale?: number;
  readonly displacement?: number;
  /** How many displacement bytes; 0 only where the base allows it. */
  readonly displacementBytes?: 0 | 1 | 4;
  /** Displacement from the end of the instruction. */
  readonly ripRelative?: boolean;
  readonly segment?: 'fs' | 'gs' | 'ds' | 'ss' | 'es';
  readonly address32?: boolean;
}

export interface Encoding {
  /** F0, 66, F2 or F3, in front of everything. */
  readonly prefixes?: readonly number[];
  /** With its 0F, 0F 38 or 0F 3A. For VEX: the last byte only. */
  readonly opcode: readonly number[];
  readonly reg?: number;
  readonly rm?: number | MemoryOperand;
  readonly w?: boolean;
  /** A REX prefix even where no bit of it is set. */
  readonly rex?: boolean;
  readonly vex?: { readonly map: number; readonly pp: number; readonly vvvv: number; readonly l?: number };
  readonly immediate?: number;
}

const SEGMENT_PREFIX = { es: 0x26, ss: 0x36, ds: 0x3e, fs: 0x64, gs: 0x65 } as const;

/** The bytes of an instruction. */
export function encode(e: Encoding): Uint8Array {
  const memory = typeof e.rm === 'object' ? e.rm : undefined;
  const reg = e.reg ?? 0;
  const tail = e.rm === undefined ? [] : modrm(reg, e.rm);
  const immediate = e.immediate === undefined ? [] : [e.immediate];
  const b = typeof e.rm === 'number' ? e.rm : (memory?.base ?? 0);
  const r = reg >> 3;
  const x = (memory?.index ?? 0) >> 3;
  const prefixes = [...(e.prefixes ?? [])];
  if (memory?.segment) prefixes.unshift(SEGMENT_PREFIX[memory.segment]);
  if (memory?.address32) prefixes.unshift(0x67);
  if (e.vex) {
    const { map, pp, vvvv, l = 0 } = e.vex;
    const first = ((r ^ 1) << 7) | ((x ^ 1) << 6) | (((b >> 3) ^ 1) << 5) | map;
    const second = ((e.w ? 1 : 0) << 7) | ((vvvv ^ 15) << 3) | (l << 2) | pp;
    return Uint8Array.from([...prefixes, 0xc4, first, second, ...e.opcode, ...tail, ...immediate]);
  }
  const rex = ((e.w ? 1 : 0) << 3) | (r << 2) | (x << 1) | (b >> 3);
  const rexBytes = rex || e.rex ? [0x40 | rex] : [];
  return Uint8Array.from([...prefixes, ...rexBytes, ...e.opcode, ...tail, ...immediate]);
}

function modrm(reg: number, rm: number | MemoryOperand): number[] {
  const field = (reg & 7) << 3;
  if (typeof rm === 'number') return [0xc0 | field | (rm & 7)];
  const { base, index, scale = 0, displacement = 0 } = rm;
  const wide = [0, 8, 16, 24].map((shift) => (displacement >> shift) & 0xff);
  if (rm.ripRelative) return [field | 5, ...wide];
  if (base === undefined) return [field | 4, (scale << 6) | (((index ?? 4) & 7) << 3) | 5, ...wide];
  const count = rm.displacementBytes ?? 4;
  const mod = { 0: 0, 1: 0x40, 4: 0x80 }[count];
  const tail = wide.slice(0, count);
  if (index === undefined && (base & 7) !== 4) return [mod | field | (base & 7), ...tail];
  return [mod | field | 4, (scale << 6) | (((index ?? 4) & 7) << 3) | (base & 7), ...tail];
}
