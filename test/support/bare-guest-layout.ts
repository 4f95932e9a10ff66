import type { GuestMemory } from '#dist/memory/guest-memory.js';

/**
 * Where everything is in a bare guest: 2 MiB of RAM, mapped where it is by 4 KiB pages. Selectors are those of Linux: a
 * nested KVM runs user mode on the host's own descriptors.
 */
export const bare = {
  memory: 0x20_0000,
  pml4: 0x1000,
  pageTable: 0x4000,
  gdt: 0x5000,
  idt: 0x6000,
  tss: 0x7000,
  /** 256 stubs of 16 bytes: `out FAULT_PORT, al; hlt`. The vector is the stub that ran. */
  stubs: 0x8000,
  kernelStackTop: 0xc000,
  /** Stack of interrupt stack table entry 1, on which gates run by default: a snippet may use RSP as it likes. */
  ist1Top: 0xe000,
  /** Two pages that hold the snippet. */
  code: 0x1_0000,
  userStackTop: 0x2_4000,
  /** 16 writable user pages; the page after them is not present. */
  data: 0x3_0000,
  dataEnd: 0x4_0000,
  /** Pairs of pages: a writable user page, then one of the kind named. */
  readOnly: 0x4_2000,
  supervisor: 0x4_4000,
  noExecute: 0x4_6000,
  /** Where non-canonical addresses start. */
  nonCanonical: 0x8000_0000_0000n,
} as const;

export const selectors = {
  kernelCs: 0x10,
  kernelSs: 0x18,
  userCs32: 0x23,
  userSs: 0x2b,
  userCs: 0x33,
  tss: 0x40,
} as const;

/** Ports of a bare guest: the end of a snippet, and a fault. */
export const DONE_PORT = 0xe0;
export const FAULT_PORT = 0xe1;

/** Page-table bits (SDM 3A 4.5). */
export const pte = { P: 1, W: 2, U: 4, A: 0x20, D: 0x40, PS: 0x80, NX: 1n << 63n } as const;

/** Vectors that push an error code (SDM 3A 6.13). */
export const WITH_ERROR_CODE: ReadonlySet<number> = new Set([8, 10, 11, 12, 13, 14, 17, 21, 29, 30]);

/** Sets the page-table entry of one of the guest's pages. */
export function setPage(memory: GuestMemory, address: number, flags: number, noExecute = false): void {
  const value = BigInt((address & ~0xfff) | flags) | (noExecute ? pte.NX : 0n);
  memory.writeU64(bare.pageTable + (address >> 12) * 8, value);
}

/** Accessed and dirty bits of a page, as `0x60`-masked flags. */
export function accessedDirty(memory: GuestMemory, address: number): number {
  return Number(memory.readU64(bare.pageTable + (address >> 12) * 8) & 0x60n);
}

/** Writes page tables, descriptor tables, task state and the fault stubs. */
export function writeTables(memory: GuestMemory): void {
  writePageTables(memory);
  writeGdt(memory);
  for (let vector = 0; vector < 256; vector++) {
    setGate(memory, vector, {});
    memory.write(bare.stubs + vector * 16, Uint8Array.of(0xe6, FAULT_PORT, 0xf4));
  }
  memory.writeU64(bare.tss + 4, BigInt(bare.kernelStackTop)); // RSP0
  memory.writeU64(bare.tss + 0x24, BigInt(bare.ist1Top));
  memory.writeU16(bare.tss + 0x66, 0x68); // no I/O bitmap
}

/** Identity-maps the guest, with the pages of every kind that `bare` lists. */
function writePageTables(memory: GuestMemory): void {
  for (let level = 0; level < 3; level++) {
    memory.writeU64(bare.pml4 + level * 0x1000, BigInt((bare.pml4 + (level + 1) * 0x1000) | pte.P | pte.W | pte.U));
  }
  const user = pte.P | pte.W | pte.U;
  for (let at = 0; at < bare.memory; at += 0x1000) setPage(memory, at, at < bare.code ? pte.P | pte.W : user);
  setPage(memory, bare.dataEnd, 0);
  setPage(memory, bare.readOnly, pte.P | pte.U);
  setPage(memory, bare.supervisor, pte.P | pte.W);
  setPage(memory, bare.noExecute, user, true);
}

function writeGdt(memory: GuestMemory): void {
  const descriptors: [number, bigint][] = [
    [selectors.kernelCs, 0x00af9b000000ffffn],
    [selectors.kernelSs, 0x00cf93000000ffffn],
    [selectors.userCs32, 0x00cffb000000ffffn],
    [selectors.userSs, 0x00cff3000000ffffn],
    [selectors.userCs, 0x00affb000000ffffn],
    [selectors.tss, 0x0000890000000067n | (BigInt(bare.tss) << 16n)],
  ];
  for (const [selector, value] of descriptors) memory.writeU64(bare.gdt + (selector & ~7), value);
}

/** A 64-bit interrupt gate (SDM 3A 6.14.1). */
export interface Gate {
  offset?: bigint;
  selector?: number;
  dpl?: number;
  /** 14 interrupt gate, 15 trap gate. */
  type?: number;
  ist?: number;
  present?: boolean;
}

/** Sets a gate of the guest's IDT: by default an interrupt gate to the vector's stub that user mode may call. */
export function setGate(memory: GuestMemory, vector: number, gate: Gate): void {
  const {
    offset = BigInt(bare.stubs + vector * 16),
    selector = selectors.kernelCs,
    dpl = 3,
    type = 14,
    ist = 0,
  } = gate;
  const present = (gate.present ?? true) ? 0x8000n : 0n;
  const attributes = present | BigInt((dpl << 13) | (type << 8) | ist);
  const low =
    (offset & 0xffffn) | (BigInt(selector) << 16n) | (attributes << 32n) | (((offset >> 16n) & 0xffffn) << 48n);
  memory.writeU64(bare.idt + vector * 16, low);
  memory.writeU64(bare.idt + vector * 16 + 8, (offset >> 32n) & 0xffffffffn);
}
