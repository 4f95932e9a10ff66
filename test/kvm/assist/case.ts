import { bare } from '../../support/bare-guest-layout.js';
import { type Encoding, encode } from './encode.js';
import { type Case, WINDOW } from './executor.js';
import { addressOf, type Place, reach } from './operands.js';
import type { Random } from './random.js';

/** CF, PF, AF, ZF, SF, OF. */
export const ALL_FLAGS = 0x8d5n;

/** An instruction to test: how it is written, and what of its result is defined. */
export interface Spec {
  /** What complete() calls it. */
  readonly kind: string;
  readonly prefix?: 0x66 | 0xf2 | 0xf3;
  readonly opcode: readonly number[];
  /** ModRM.reg, when it is part of the opcode. */
  readonly extension?: number;
  readonly vex?: { readonly map: number; readonly pp: number };
  /** Operand sizes in bytes; 2 adds a 66 prefix, 8 sets W. Instructions without operand sizes have [4]. */
  readonly sizes?: readonly number[];
  readonly form?: 'memory' | 'register' | 'none';
  /** Bytes of the memory operand, where it is not the operand size. */
  readonly width?: number;
  /** Its first bytes that are accessed whatever the state: those that cross into another page, where it is not all. */
  readonly core?: number;
  readonly align?: number;
  readonly writes?: boolean;
  readonly immediate?: boolean;
  readonly lock?: boolean;
  /** Registers that the instruction uses beside its operands. */
  readonly fixed?: readonly number[];
  /** Flags whose value after it is defined; the rest of the arithmetic ones are not compared. */
  readonly flags?: bigint;
  /** The general register in ModRM.reg is a vector register, and so is that of rm, if set. */
  readonly vectorRm?: boolean;
  /** What it yields depends on the privilege level: it is compared in user mode only. */
  readonly userOnly?: boolean;
  /** Loads x87, SSE and extended state from its operand. */
  readonly loads?: boolean;
  /** Bits of EDX:EAX that it may yield natively because the host's own XCR0 has them, not the vCPU's. */
  readonly hostBits?: bigint;
  /** Changes the random state before the run. */
  readonly arrange?: (draft: Draft, random: Random) => void;
}

/** A case in the making. */
export interface Draft {
  gprs: bigint[];
  rflags: bigint;
  memory: Uint8Array;
  xsave: Uint8Array;
  /** Offset of the operand in memory, when it is in the window. */
  readonly operand: number | undefined;
}

const PLACES: readonly Place[] = [
  ...Array<Place>(8).fill('data'),
  'pageCrossing',
  'notPresent',
  'crossingToNotPresent',
  'readOnly',
  'crossingToReadOnly',
  'supervisor',
  'nonCanonical',
];

export interface RandomCase extends Case {
  readonly place: Place | 'register';
  /** Whether the operand breaks the instruction's alignment. */
  readonly misaligned: boolean;
}

const ALL_REGISTERS = Array.from({ length: 16 }, (_, i) => i);

/** A random case of an instruction. @param xsave the state to start from. */
export function randomCase(spec: Spec, random: Random, xsave: Uint8Array): RandomCase {
  const size = random.pick(spec.sizes ?? [4]);
  const width = spec.width ?? size;
  const gprs = Array.from({ length: 16 }, () => random.u64());
  gprs[4] = BigInt(bare.userStackTop);
  const memory = random.fill(new Uint8Array(WINDOW.length));
  const rflags = (random.u64() & ALL_FLAGS) | 2n;
  const isMemory = spec.form === 'memory' || (spec.form === undefined && random.chance(60));
  const place = isMemory ? random.pick(PLACES) : 'register';

  // RSP is the stack of faults at CPL 0, and no nested KVM runs user mode with one that is not canonical.
  const anyRegister = () => random.pick(spec.vectorRm ? ALL_REGISTERS : ALL_REGISTERS.filter((i) => i !== 4));
  const base: Encoding = {
    opcode: spec.opcode,
    prefixes: [
      ...(spec.lock ? [0xf0] : []),
      ...(size === 2 && spec.prefix !== 0x66 ? [0x66] : []),
      ...(spec.prefix ? [spec.prefix] : []),
    ],
    reg: spec.extension ?? anyRegister(),
    w: size === 8,
    rex: random.chance(20),
    ...(spec.vex ? { vex: { ...spec.vex, vvvv: anyRegister() } } : {}),
    ...(spec.immediate ? { immediate: random.below(256) } : {}),
  };
  let address: bigint | undefined;
  let misaligned = false;
  let encoding = base;
  let fs = { fsBase: 0n, gsBase: 0n };
  if (place !== 'register') {
    const align = spec.align && !random.chance(15) ? spec.align : 1;
    address = addressOf(place, place.startsWith('crossing') ? (spec.core ?? width) : width, align, random);
    misaligned = address % BigInt(spec.align ?? 1) !== 0n;
    const reserved = [...(spec.fixed ?? [])];
    if (!spec.vectorRm && spec.extension === undefined) reserved.push(base.reg as number);
    if (base.vex) reserved.push(base.vex.vvvv);
    const end = (rm: Encoding['rm']) =>
      BigInt(bare.code + encode({ ...base, ...(rm === undefined ? {} : { rm }) }).length);
    const { operand, gprs: wanted, ...bases } = reach(address, reserved, random, end);
    for (const [number, value] of Object.entries(wanted)) gprs[Number(number)] = value;
    encoding = { ...base, rm: operand };
    fs = bases;
  } else if (spec.form !== 'none') {
    encoding = { ...base, rm: anyRegister() };
  }
  const offset = address === undefined ? -1 : Number(address) - WINDOW.start;
  const draft: Draft = {
    gprs,
    rflags,
    memory,
    xsave: xsave.slice(),
    operand: offset >= 0 && offset + width <= WINDOW.length ? offset : undefined,
  };
  spec.arrange?.(draft, random);
  return { ...draft, code: encode(encoding), place, misaligned, ...fs };
}
