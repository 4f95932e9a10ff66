import type { GuestMemory } from '../../../memory/guest-memory.js';
import { GuestFault, vector } from './fault.js';

/** Kinds of access, as the bits that a page fault reports (SDM 3A 4.7). */
export const access = { READ: 0, WRITE: 2, FETCH: 16 } as const;

/** What decides how a linear address is translated (SDM 3A 4.1 and 4.6). */
export interface Paging {
  /** 4 or 5; 0 when paging is off and linear addresses are physical. */
  levels: 0 | 4 | 5;
  /** Physical address of the topmost table. */
  root: number;
  /** CR0.WP */
  writeProtect: boolean;
  /** EFER.NXE */
  noExecute: boolean;
  /** CR4.SMEP */
  smep: boolean;
  /** CR4.SMAP and not RFLAGS.AC: supervisor data accesses to user pages fault. */
  smap: boolean;
  /** MAXPHYADDR: address bits from here up are reserved in an entry. */
  physicalBits: number;
}

const PRESENT = 1;
const WRITABLE = 2;
const USER = 4;
const ACCESSED = 0x20;
const DIRTY = 0x40;
const LARGE = 0x80;
const RESERVED = 8;
const HIGH = 2 ** 32;

/**
 * Translates a linear address as the CPU would, sets accessed and dirty flags, and returns the physical address. The
 * address must be canonical. Protection keys and shadow stacks are not looked at: KVM offers a guest neither where its
 * kernel is interpreted.
 * @param user whether this is a user-mode access.
 * @throws GuestFault #PF. @throws GuestMemoryRangeError if a table is not in RAM.
 */
export function translate(memory: GuestMemory, paging: Paging, linear: bigint, kind: number, user: boolean): number {
  if (paging.levels === 0) return Number(linear & 0xffff_ffffn);
  const fault = (why: number) => {
    const fetch = kind === access.FETCH && !(paging.noExecute || paging.smep) ? 0 : kind;
    return new GuestFault(vector.PF, why | fetch | (user ? USER : 0), linear);
  };
  const address = Number(linear & 0xffff_ffff_ffffn);
  let table = paging.root;
  let granted = WRITABLE | USER;
  let executable = true;
  const path: number[] = [];
  for (let level: number = paging.levels; ; level--) {
    const span = 2 ** (3 + 9 * level); // bytes that one entry maps
    const index = level === 5 ? Number((linear >> 48n) & 0x1ffn) : Math.floor(address / span) % 512;
    const at = table + index * 8;
    const low = memory.readU32(at);
    const high = memory.readU32(at + 4);
    if (!(low & PRESENT)) throw fault(0);
    const leaf = level === 1 || (level <= 3 && (low & LARGE) !== 0);
    if (reserved(low, high, level, leaf, paging)) throw fault(PRESENT | RESERVED);
    granted &= low;
    if (high >>> 31) executable = false;
    path.push(at);
    const frame = (high & 0xf_ffff) * HIGH + ((low & 0xffff_f000) >>> 0);
    if (!leaf) {
      table = frame;
      continue;
    }
    if (!allowed(granted, executable, kind, user, paging)) throw fault(PRESENT);
    mark(memory, path, kind === access.WRITE);
    return frame - (frame % span) + (address % span);
  }
}

/** Bits that must be zero in a present entry (SDM 3A tables 4-14 to 4-20). */
function reserved(low: number, high: number, level: number, leaf: boolean, paging: Paging): boolean {
  if (high >>> 31 && !paging.noExecute) return true;
  const addressBits = high & 0xf_ffff;
  if (paging.physicalBits < 52 && addressBits >>> Math.max(0, paging.physicalBits - 32)) return true;
  if (level >= 4) return (low & LARGE) !== 0;
  if (!leaf || level === 1) return false;
  return (low & (level === 3 ? 0x3fff_e000 : 0x001f_e000)) !== 0;
}

/** SDM 3A 4.6.1. */
function allowed(granted: number, executable: boolean, kind: number, user: boolean, paging: Paging): boolean {
  const userPage = (granted & USER) !== 0;
  if (kind === access.FETCH) {
    if (!executable) return false;
    return user ? userPage : !(userPage && paging.smep);
  }
  if (user ? !userPage : userPage && paging.smap) return false;
  return kind !== access.WRITE || (granted & WRITABLE) !== 0 || (!user && !paging.writeProtect);
}

/** SDM 3A 4.8. */
function mark(memory: GuestMemory, path: number[], dirty: boolean): void {
  for (let i = 0; i < path.length; i++) {
    const at = path[i] as number;
    const bits = ACCESSED | (dirty && i === path.length - 1 ? DIRTY : 0);
    if ((memory.readU8(at) & bits) === bits) continue;
    const entry = memory.slice(at, 1);
    // Another vCPU may change the entry meanwhile: what it unmaps must stay so.
    for (let found = entry[0] as number, seen = -1; found !== seen && found & PRESENT; ) {
      seen = found;
      found = Atomics.compareExchange(entry, 0, seen, seen | bits);
    }
  }
}
