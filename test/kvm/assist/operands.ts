import { bare } from '../../support/bare-guest-layout.js';
import type { MemoryOperand } from './encode.js';
import type { Random } from './random.js';

/** What a memory operand is placed on. */
export type Place =
  | 'data'
  | 'pageCrossing'
  | 'notPresent'
  | 'crossingToNotPresent'
  | 'readOnly'
  | 'crossingToReadOnly'
  | 'supervisor'
  | 'nonCanonical';

/** A linear address of that kind for an operand of `length` bytes. */
export function addressOf(place: Place, length: number, align: number, random: Random): bigint {
  const aligned = (address: number) => BigInt(address - (address % align));
  const crossing = (page: number) => aligned(page - 1 - (length > 1 ? random.below(length - 1) : 0));
  switch (place) {
    case 'data':
      return aligned(bare.data + random.below(bare.dataEnd - bare.data - length));
    case 'pageCrossing':
      return crossing(bare.data + 0x1000 * (1 + random.below(14)));
    case 'notPresent':
      return aligned(bare.dataEnd + random.below(0x1000 - length));
    case 'crossingToNotPresent':
      return crossing(bare.dataEnd);
    case 'readOnly':
      return aligned(bare.readOnly + random.below(0x1000 - length));
    case 'crossingToReadOnly':
      return crossing(bare.readOnly);
    case 'supervisor':
      return aligned(bare.supervisor + random.below(0x1000 - length));
    case 'nonCanonical':
      return bare.nonCanonical + BigInt(random.below(0x10000) & ~63);
  }
}

const RSP = 4;

export interface Addressing {
  readonly operand: MemoryOperand;
  readonly gprs: Record<number, bigint>;
  readonly fsBase: bigint;
  readonly gsBase: bigint;
}

/**
 * A random addressing form that reaches an address, and what registers must hold for it.
 * @param reserved registers that the instruction itself uses. @param instructionEnd for RIP-relative forms.
 */
export function reach(
  address: bigint,
  reserved: readonly number[],
  random: Random,
  instructionEnd: (operand: MemoryOperand) => bigint,
): Addressing {
  const free = Array.from({ length: 16 }, (_, i) => i).filter((i) => i !== RSP && !reserved.includes(i));
  const small = address < 0x7fff_0000n;
  let segment: MemoryOperand['segment'];
  let bases = { fsBase: 0n, gsBase: 0n };
  let target = address;
  if (random.chance(25)) {
    // KVM's emulator, which gets to see some faults of user mode on a nested host, takes an SS override for a stack access.
    segment = random.pick(small ? (['fs', 'gs', 'ds', 'es', 'ss'] as const) : (['fs', 'gs', 'ds', 'es'] as const));
    if (segment === 'fs' || segment === 'gs') {
      const base = BigInt(random.below(0x8000));
      bases = segment === 'fs' ? { fsBase: base, gsBase: 0x5000n } : { fsBase: 0x5000n, gsBase: base };
      target -= base;
    }
  }
  const common = segment ? { segment } : {};
  const kind = small ? random.below(7) : 6;
  if (kind === 0) {
    const guess: MemoryOperand = { ...common, ripRelative: true, displacement: 0 };
    const displacement = Number(target - instructionEnd(guess));
    return { operand: { ...guess, displacement }, gprs: {}, ...bases };
  }
  if (kind === 1) {
    return { operand: { ...common, displacement: Number(target) }, gprs: {}, ...bases };
  }
  if (kind === 2 && !reserved.includes(RSP)) {
    // RSP stays where the stack is: at CPL 0 faults push onto it.
    const displacement = Number(target - BigInt(bare.userStackTop));
    return { operand: { ...common, base: RSP, displacement }, gprs: {}, ...bases };
  }
  const address32 = small && random.chance(20);
  const junk = address32 ? BigInt(random.u32()) << 32n : 0n;
  const bytes = random.pick([0, 1, 4] as const);
  const base = random.pick(free.filter((i) => bytes !== 0 || (i & 7) !== 5));
  const displacement = bytes === 0 ? 0 : bytes === 1 ? random.below(256) - 128 : random.below(0x2_0000) - 0x1_0000;
  const shape = { ...common, base, displacement, displacementBytes: bytes, address32 };
  const indexes = free.filter((i) => i !== base);
  let left = target - BigInt(displacement);
  if (kind < 5 || indexes.length === 0) {
    return { operand: shape, gprs: { [base]: BigInt.asUintN(64, left) | junk }, ...bases };
  }
  const index = random.pick(indexes);
  const scale = random.below(4);
  const value = BigInt(random.below(0x1000));
  left -= value << BigInt(scale);
  const gprs = { [index]: value | junk, [base]: BigInt.asUintN(address32 ? 32 : 64, left) | junk };
  return { operand: { ...shape, index, scale }, gprs, ...bases };
}
