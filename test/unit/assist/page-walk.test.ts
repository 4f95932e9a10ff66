import { beforeEach, describe, expect, it } from 'vitest';
import { GuestFault } from '#dist/arch/x86_64/assist/fault.js';
import { access, type Paging, translate } from '#dist/arch/x86_64/assist/page-walk.js';
import { GuestMemory, GuestMemoryRangeError } from '#dist/memory/guest-memory.js';

// SDM 3A chapter 4: 4.5 (4- and 5-level paging), 4.6 (access rights), 4.7 (page-fault exceptions), 4.8 (accessed, dirty).

const [P, W, U, A, D, PS] = [1n, 2n, 4n, 0x20n, 0x40n, 0x80n];
const NX = 1n << 63n;
const { READ, WRITE, FETCH } = access;
const LINEAR = 0x7fff_1234_5678n;

let memory: GuestMemory;
let paging: Paging;

/** Addresses of the entries that LINEAR uses, topmost first. */
const entry = (level: number, linear = LINEAR) =>
  0x1000 * (6 - level) + Number((linear >> BigInt(3 + 9 * level)) & 511n) * 8;

function setEntry(level: number, value: bigint): void {
  memory.writeU64(entry(level), value);
}

/** Maps LINEAR by tables at 0x1000 (level 5) to 0x5000 (level 1), all of them allowing everything. */
function map(leaf: bigint, level = 1): void {
  for (let l = 5; l > level; l--) setEntry(l, BigInt(0x1000 * (7 - l)) | P | W | U);
  setEntry(level, leaf);
}

beforeEach(() => {
  memory = new GuestMemory([{ gpa: 0, buffer: new ArrayBuffer(0x10000) }]);
  paging = { levels: 4, root: 0x2000, writeProtect: true, noExecute: true, smep: true, smap: false, physicalBits: 48 };
});

/** The error code of the page fault, or -1 when there is none. */
function errorCode(kind: number, user: boolean, linear = LINEAR): number {
  try {
    translate(memory, paging, linear, kind, user);
    return -1;
  } catch (error) {
    if (!(error instanceof GuestFault)) throw error;
    expect([error.vector, error.cr2]).toEqual([14, linear]);
    return error.errorCode as number;
  }
}

describe('translate', () => {
  it('finds 4 KiB, 2 MiB and 1 GiB pages with 4 and 5 levels', () => {
    map(0x9000n | P);
    expect(translate(memory, paging, LINEAR, READ, false)).toBe(0x9678);
    map(0x8060_0000n | P | PS, 2);
    expect(translate(memory, paging, LINEAR, READ, false)).toBe(0x8060_0000 + Number(LINEAR & 0x1f_ffffn));
    map(0xc0_4000_0000n | P | PS, 3);
    expect(translate(memory, paging, LINEAR, READ, false)).toBe(0xc0_4000_0000 + Number(LINEAR & 0x3fff_ffffn));
    map(0x9000n | P);
    paging.levels = 5;
    paging.root = 0x1000;
    expect(translate(memory, paging, LINEAR, READ, false)).toBe(0x9678);
  });

  it('indexes all five levels', () => {
    const linear = 0xff12_3456_789a_bcden;
    paging.levels = 5;
    paging.root = 0x1000;
    for (let level = 5; level > 1; level--) memory.writeU64(entry(level, linear), BigInt(0x1000 * (7 - level)) | P);
    memory.writeU64(entry(1, linear), 0x9000n | P);
    expect(translate(memory, paging, linear, READ, false)).toBe(0x9cde);
  });

  it('is the identity without paging', () => {
    paging.levels = 0;
    expect(translate(memory, paging, 0x1234n, WRITE, false)).toBe(0x1234);
  });

  it('reports an absent entry at every level', () => {
    for (let level = 4; level >= 1; level--) {
      map(0x9000n | P);
      setEntry(level, 0n);
      expect([errorCode(READ, false), errorCode(WRITE, true), errorCode(FETCH, true)]).toEqual([0, 6, 0x14]);
    }
  });

  it('allows what every level allows', () => {
    for (let level = 4; level >= 1; level--) {
      const target = level === 1 ? 0x9000n : BigInt(0x1000 * (7 - level));
      map(0x9000n | P | W | U);
      setEntry(level, target | P | W);
      expect([errorCode(READ, true), errorCode(READ, false)], `U at ${level}`).toEqual([5, -1]);
      setEntry(level, target | P | U);
      expect([errorCode(WRITE, true), errorCode(WRITE, false)], `W at ${level}`).toEqual([7, 3]);
      setEntry(level, target | P | W | U | NX);
      expect([errorCode(FETCH, true), errorCode(READ, true)], `NX at ${level}`).toEqual([0x15, -1]);
    }
  });

  it('lets the supervisor write read-only pages without CR0.WP', () => {
    map(0x9000n | P | U);
    paging.writeProtect = false;
    expect([errorCode(WRITE, false), errorCode(WRITE, true)]).toEqual([-1, 7]);
  });

  it('honours SMEP and SMAP', () => {
    map(0x9000n | P | W | U);
    expect([errorCode(FETCH, false), errorCode(READ, false)]).toEqual([0x11, -1]);
    paging.smep = false;
    paging.smap = true;
    expect([errorCode(FETCH, false), errorCode(READ, false), errorCode(WRITE, false)]).toEqual([-1, 1, 3]);
    expect(errorCode(READ, true)).toBe(-1);
  });

  it('reports a fetch as one only with NX or SMEP', () => {
    map(0n);
    paging.noExecute = false;
    expect(errorCode(FETCH, true)).toBe(0x14);
    paging.smep = false;
    expect(errorCode(FETCH, true)).toBe(4);
  });

  it('reports reserved bits', () => {
    map(0x9000n | P | (1n << 48n));
    expect(errorCode(READ, false)).toBe(9);
    map(0x60_1000n | P | PS | (1n << 13n), 2);
    expect(errorCode(READ, false)).toBe(9);
    map(P | PS | (1n << 29n), 3);
    expect(errorCode(READ, true)).toBe(0xd);
    map(P | PS, 4);
    expect(errorCode(READ, false)).toBe(9);
    map(0x9000n | P | NX);
    paging.noExecute = false;
    expect(errorCode(READ, false)).toBe(9);
  });

  it('takes PAT of a large page for no reserved bit', () => {
    map(0x60_0000n | P | PS | (1n << 12n), 2);
    expect(translate(memory, paging, LINEAR, READ, false)).toBe(0x60_0000 + Number(LINEAR & 0x1f_ffffn));
  });

  it('sets accessed everywhere, dirty in the leaf and only by a write, nothing on a fault', () => {
    map(0x9000n | P | U);
    expect(errorCode(WRITE, false)).toBe(3);
    const flags = () => [4, 3, 2, 1].map((level) => memory.readU64(entry(level)) & (A | D));
    expect(flags()).toEqual([0n, 0n, 0n, 0n]);
    expect(errorCode(READ, true)).toBe(-1);
    expect(flags()).toEqual([A, A, A, A]);
    map(0x9000n | P | W);
    expect(errorCode(WRITE, false)).toBe(-1);
    expect(flags()).toEqual([A, A, A, A | D]);
  });

  it('throws a range error for tables outside RAM', () => {
    map(0x9000n | P);
    setEntry(3, 0x100_0000n | P);
    expect(() => translate(memory, paging, LINEAR, READ, false)).toThrow(GuestMemoryRangeError);
  });
});
