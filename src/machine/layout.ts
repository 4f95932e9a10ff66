/**
 * The only address and interrupt map of a machine: guest physical addresses, I/O ports and GSIs. Anything that needs one
 * takes it from here.
 */

const KiB = 1024;
const MiB = 1024 * KiB;
const GiB = 1024 * MiB;

export const PAGE_SIZE = 4096;

/** Guest physical addresses. */
export const layout = {
  // Below 1 MiB: what the boot protocols need before the kernel has its own tables.
  bootGdt: 0x500,
  bootIdt: 0x520,
  pvhStartInfo: 0x6000,
  bootParams: 0x7000,
  /** PML4, PDPT and four page directories: the first 4 GiB, identity-mapped with 2 MiB pages. */
  bootPageTables: 0x9000,
  commandLine: 0x20000,
  commandLineLimit: 0x10000,
  /** End of conventional memory; then the MP table, and in the last KiB of base memory, where an OS looks, its pointer. */
  lowMemoryEnd: 0x9_e000,
  mpTable: 0x9_e000,
  mpPointer: 0x9_fc00,
  baseMemoryEnd: 0xa_0000,
  /** ACPI tables, RSDP first: where the PC has its ROMs, and a kernel that is not told would search. */
  acpiTables: 0xe_0000,
  acpiTablesEnd: 0xf_f000,
  /** A page of its own, reserved, with the 16 bytes of the VM generation ID. */
  vmGenerationId: 0xf_f000,
  /** Where RAM goes on after the hole of the PC's video memory and ROMs. */
  highMemoryStart: 1 * MiB,

  /** RAM stops here and goes on at 4 GiB: the space between is for MMIO. */
  mmioHoleStart: 3 * GiB,
  mmioHoleEnd: 4 * GiB,
  virtioMmioBase: 0xd000_0000,
  virtioMmioStride: 0x1000,
  /** MMIO devices of users. */
  userMmioBase: 0xd100_0000,
  userMmioEnd: 0xf000_0000,
  ioapic: 0xfec0_0000,
  /** One page for KVM's identity map, then three for its TSS (Intel hosts without unrestricted guest). */
  identityMap: 0xfffb_c000,
  tss: 0xfffb_d000,
  localApic: 0xfee0_0000,
} as const;

/** I/O ports. */
export const ports = {
  /** Until the guest touches it, or port 0x61: then they are KVM's. */
  pit: { base: 0x40, length: 4 },
  i8042: { base: 0x60, length: 5 },
  cmos: { base: 0x70, length: 2 },
  /** The low byte of what is written here ends the machine with that exit code. */
  debugExit: { base: 0xf4, length: 4 },
  /** A byte written here stamps a milestone: 1 `init`, 2 `shell`, others by number. */
  bootTimer: { base: 0xf8, length: 1 },
  serial: { base: 0x3f8, length: 8 },
  /** ACPI 6.4 section 4.8.3.7 sleep control register: SLP_EN (bit 5) with SLP_TYP 5 powers off. And sleep status. */
  sleepControl: { base: 0x600, length: 1 },
} as const;

/** Global system interrupts (IOAPIC pins, equal to the ISA IRQ numbers below 16). */
export const gsi = {
  /** Edge-triggered: the VM generation ID has changed. COM2's on a PC, which there is none of here. */
  vmGenerationId: 3,
  serial: 4,
  cmos: 8,
  /** Virtio devices from the first on, MMIO devices of users from the last back. */
  virtio: [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
} as const;

/** One interrupt each, which MMIO devices of users take from. */
export const MAX_VIRTIO_DEVICES = gsi.virtio.length;

/** Where the virtio device of that index answers, and its interrupt. @param index 0 to MAX_VIRTIO_DEVICES - 1. */
export function virtioSlot(index: number): { base: number; length: number; gsi: number } {
  const { virtioMmioBase: base, virtioMmioStride: length } = layout;
  return { base: base + index * length, length, gsi: gsi.virtio[index] as number };
}

/** IOAPIC pins. */
export const IOAPIC_PINS = 24;

/** vCPU n has local APIC ID n, and the IOAPIC the ID after the last; an ID has 8 bits, and 255 addresses all. */
export const MAX_CPUS = 254;
