import { layout, PAGE_SIZE } from '../../machine/layout.js';
import type { GuestMemory } from '../../memory/guest-memory.js';

// Paging-structure entry bits: Intel SDM volume 3, tables 4-15 (PML4E), 4-17 (PDPTE) and 4-18 (PDE of a 2 MiB page).
const PRESENT = 1 << 0;
const WRITABLE = 1 << 1;
const ACCESSED = 1 << 5;
const DIRTY = 1 << 6;
const LARGE_PAGE = 1 << 7;
// Accessed and dirty are set beforehand, so that no walk has to write the tables.
const TABLE = PRESENT | WRITABLE | ACCESSED;
const LARGE = TABLE | DIRTY | LARGE_PAGE;

const ENTRIES = 512;
const DIRECTORIES = 4;
const LARGE_PAGE_SIZE = 2 << 20;

/**
 * Writes tables that map the first 4 GiB to themselves with 2 MiB pages at layout.bootPageTables, as the 64-bit boot
 * protocol asks (boot.rst, "64-bit Boot Protocol": the kernel, the zero page and the command line are identity-mapped).
 * Returns the address of the PML4, for CR3.
 */
export function writeBootPageTables(memory: GuestMemory): number {
  const pml4 = layout.bootPageTables;
  const pdpt = pml4 + PAGE_SIZE;
  const directories = pdpt + PAGE_SIZE;
  memory.zero(pml4, 2 * PAGE_SIZE);
  memory.writeU32(pml4, pdpt | TABLE);
  for (let i = 0; i < DIRECTORIES; i++) memory.writeU32(pdpt + 8 * i, (directories + i * PAGE_SIZE) | TABLE);
  identity ??= identityDirectories();
  memory.write(directories, identity);
  return pml4;
}

/** The same for every machine. */
let identity: Uint8Array | undefined;

function identityDirectories(): Uint8Array {
  const entries = new Uint32Array(2 * DIRECTORIES * ENTRIES); // the upper half of each is 0
  for (let i = 0; i < DIRECTORIES * ENTRIES; i++) entries[2 * i] = (i * LARGE_PAGE_SIZE) | LARGE;
  return new Uint8Array(entries.buffer);
}

/** Selectors of the boot GDT (boot.rst, "64-bit Boot Protocol"). */
export const BOOT_CS = 0x10;
export const BOOT_DS = 0x18;

/** Bytes of the boot GDT; its limit is one less. */
export const BOOT_GDT_SIZE = 32;

// Segment descriptors: Intel SDM volume 3, section 3.4.5, and 5.2.1 for the L bit. Flat, 4 GiB, present, DPL 0, accessed.
const CODE_64 = 0x00af_9b00_0000_ffffn; // execute/read, L
const DATA = 0x00cf_9300_0000_ffffn; // read/write

/**
 * Writes the boot GDT at layout.bootGdt (null, unused, BOOT_CS, BOOT_DS) and returns its address. The kernel replaces it
 * before it loads a segment register, but the protocol wants it there.
 */
export function writeBootGdt(memory: GuestMemory): number {
  [0n, 0n, CODE_64, DATA].forEach((descriptor, i) => {
    memory.writeU64(layout.bootGdt + 8 * i, descriptor);
  });
  return layout.bootGdt;
}
