import type { Draft, Spec } from './case.js';
import type { Random } from './random.js';

/** A state component beyond the legacy ones, as CPUID leaf 0DH lays it out. */
export interface Layout {
  readonly number: number;
  readonly offset: number;
  readonly size: number;
  readonly aligned: boolean;
}

/** Room for any area in either format. */
const WIDTH = 0xb00;
const COMPACTED = 1n << 63n;

const ALL = 0xffff_ffff_ffff_ffffn;

/** A subset of the bits, often all of them. */
function subset(bits: bigint, random: Random): bigint {
  return random.chance(30) ? bits : bits & random.u64();
}

function requestMask(draft: Draft, mask: bigint): void {
  draft.gprs[0] = mask & 0xffff_ffffn;
  draft.gprs[2] = mask >> 32n;
}

/**
 * AVX and AVX-512 components all or none. AVX in its initial configuration beside AVX-512 in use is a state that AMD CPUs
 * were seen to report wrongly to KVM, now and then, on the native side of the comparison.
 */
function withoutAvxAlone(bits: bigint): bigint {
  const wide = 0xe4n;
  return (bits & wide) === 0n ? bits : bits | wide;
}

/** An area to restore from: mostly valid, of either format, sometimes broken in one of the ways that raise #GP. */
function arrangeArea(draft: Draft, random: Random, xcr0: bigint, hostOnly: bigint, canCompact: boolean): void {
  requestMask(draft, withoutAvxAlone(subset(ALL & ~hostOnly, random)));
  const at = draft.operand;
  if (at === undefined) return;
  const view = new DataView(draft.memory.buffer, draft.memory.byteOffset);
  view.setUint32(at + 24, random.chance(95) ? random.u32() & 0xffbf : random.u32(), true);
  view.setUint16(at, 0x37f, true);
  view.setUint16(at + 2, random.below(8) << 11, true);
  view.setUint8(at + 5, 0);
  // As in a random state, no pointers.
  draft.memory.fill(0, at + 6, at + 24);
  for (let i = 512; i < 576; i += 8) view.setBigUint64(at + i, 0n, true);
  let present = withoutAvxAlone(subset(xcr0, random)) & xcr0;
  if (canCompact && random.chance(50)) {
    const formats = withoutAvxAlone(subset(xcr0, random)) & xcr0;
    present &= formats;
    if (random.chance(5)) present |= 1n << BigInt(random.pick([0, 1, 3, 4]));
    const broken = random.chance(5) ? (1n << BigInt(random.below(62))) & ~hostOnly : 0n;
    view.setBigUint64(at + 520, formats | COMPACTED | broken, true);
    if (random.chance(5)) view.setUint8(at + 528 + random.below(48), 1);
  } else {
    if (random.chance(5)) present |= 1n << BigInt(random.pick([0, 1, 3, 4, 9, 20, 40, 62]));
    // Not in the 40 bytes after: there vendors differ.
    if (random.chance(5)) view.setUint8(at + 520 + random.below(16), 1);
  }
  view.setBigUint64(at + 512, present, true);
}

/** @param xcr0 what is enabled. @param hostOnly what user mode has beyond it. @param canCompact whether the CPU has XSAVEC. */
export function xsaveSpecs(xcr0: bigint, hostOnly: bigint, canCompact: boolean): readonly Spec[] {
  const common = { sizes: [4, 8], form: 'memory', width: WIDTH, core: 512, align: 64, fixed: [0, 2] } as const;
  const save = {
    ...common,
    writes: true,
    arrange: (d: Draft, r: Random) => requestMask(d, subset(ALL & ~hostOnly, r)),
  };
  const restore = {
    ...common,
    loads: true,
    arrange: (d: Draft, r: Random) => arrangeArea(d, r, xcr0, hostOnly, canCompact),
  };
  return [
    { kind: 'xsave', opcode: [0x0f, 0xae], extension: 4, ...save },
    { kind: 'xsaveopt', opcode: [0x0f, 0xae], extension: 6, ...save },
    ...(canCompact ? [{ kind: 'xsavec', opcode: [0x0f, 0xc7], extension: 4, ...save }] : []),
    { kind: 'xrstor', opcode: [0x0f, 0xae], extension: 5, ...restore },
    { kind: 'xgetbv', opcode: [0x0f, 0x01, 0xd0], form: 'none', hostBits: hostOnly, arrange: arrangeXgetbv },
  ];
}

function arrangeXgetbv(draft: Draft, random: Random): void {
  draft.gprs[1] = random.pick([0n, 0n, 1n, 2n, 1n << 32n]);
}
