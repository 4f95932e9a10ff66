import { closeSync, openSync, readSync } from 'node:fs';
import { UsageError } from '../../../errors.js';
import { layout, ports } from '../../../machine/layout.js';
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { checksum, setAscii } from '../table-bytes.js';
import { definitionBlock, type VirtioSlot } from './dsdt.js';

export type { VirtioSlot } from './dsdt.js';

/** What the tables tell of a machine, besides what every machine has. */
export interface AcpiHardware {
  /** 1 to MAX_CPUS. */
  readonly cpus: number;
  /** Whether there is a UART. */
  readonly serial: boolean;
  readonly virtio: readonly VirtioSlot[];
}

const GENERATION_ID_SIZE = 16;
const HEADER_SIZE = 36; // ACPI 6.4 table 5.4
const RSDP_SIZE = 36; // table 5.3
const RSDP_V1_SIZE = 20;
const ALIGNMENT = 16;

/** FADT (table 5.9), of which everything not named here is 0, as it must be on a hardware-reduced machine. */
const FADT = {
  size: 276,
  century: 108,
  bootArchitecture: 109,
  flags: 112,
  resetRegister: 116,
  resetValue: 128,
  minorVersion: 131,
  xDsdt: 140,
  sleepControl: 244,
  sleepStatus: 256,
  hypervisor: 268,
} as const;

/** IAPC_BOOT_ARCH (table 5.11). Bit 1 (8042) stays 0: it has a reset line, but no keyboard to look for. */
const BOOT_ARCHITECTURE = { LEGACY_DEVICES: 1 << 0, NO_VGA: 1 << 2 } as const;

/** Fixed feature flags (table 5.10). 1 for the buttons and the clock's wake says: not in fixed hardware. */
const FEATURES = {
  WBINVD: 1 << 0,
  NO_POWER_BUTTON: 1 << 4,
  NO_SLEEP_BUTTON: 1 << 5,
  NO_FIXED_RTC_WAKE: 1 << 6,
  RESET_REGISTER: 1 << 10,
  HARDWARE_REDUCED: 1 << 20,
} as const;

const CMOS_CENTURY = 0x32;
const RESET_PULSE = 0xfe; // i8042 command: pulse output line 0

const LOCAL_APIC = 0; // table 5.21, interrupt controller structures
const IOAPIC = 1;
const LOCAL_APIC_NMI = 4;
const ALL_PROCESSORS = 0xff;

/**
 * Writes the ACPI tables from layout.acpiTables on: RSDP, XSDT, FADT, MADT and DSDT. The boot protocol hands the RSDP
 * to the kernel (`rsdp` of BootSource).
 *
 * The machine is hardware-reduced: no PM1 registers, SCI, FACS or PM timer, as it has none. Linux then also leaves PIT
 * and PIC alone (acpi_generic_reduced_hw_init in arch/x86/kernel/acpi/boot.c): no ISA interrupts, so that every
 * interrupt comes from a _CRS here, and no check of the timer at boot. It takes its clock and the TSC's frequency from
 * kvmclock, and calibrates the local APIC timer with the TSC where there is no TSC deadline (Linux 5.3 and later).
 * @returns the RSDP's guest physical address, layout.acpiTables
 * @throws UsageError if there are too many devices
 */
export function writeAcpiTables(memory: GuestMemory, hardware: AcpiHardware): number {
  const machine = JSON.stringify(hardware);
  if (last?.machine !== machine) last = { machine, tables: acpiTables(hardware) };
  memory.write(layout.acpiTables, last.tables);
  return layout.acpiTables;
}

/** Of the last machine: the next one on this thread mostly has the same. */
let last: { readonly machine: string; readonly tables: Uint8Array } | undefined;

/** What is at layout.acpiTables. */
function acpiTables(hardware: AcpiHardware): Uint8Array {
  const { cpus, virtio } = hardware;
  const bytes = new Uint8Array(layout.acpiTablesEnd - layout.acpiTables);
  let next = align(RSDP_SIZE);
  const place = (table: Uint8Array): number => {
    const at = next;
    next += align(table.length);
    if (next > bytes.length) {
      throw new UsageError(`${virtio.length} virtio devices are more than the ACPI tables have room for; use fewer`);
    }
    bytes.set(table, at);
    return layout.acpiTables + at;
  };
  const dsdt = place(systemTable('DSDT', 2, definitionBlock(hardware)));
  const tables = [place(fadt(dsdt)), place(madt(cpus))];
  bytes.set(rsdp(place(xsdt(tables))));
  return bytes.slice(0, next);
}

/** Gives a machine with ACPI tables a VM generation ID that no other has. The guest hears of it by an interrupt. */
export function renewGenerationId(memory: GuestMemory): void {
  const id = new Uint8Array(GENERATION_ID_SIZE);
  const random = openSync('/dev/urandom', 'r'); // node:crypto takes 2 ms to load
  try {
    readSync(random, id);
  } finally {
    closeSync(random);
  }
  memory.write(layout.vmGenerationId, id);
}

/** Root System Description Pointer (section 5.2.5.3). */
function rsdp(xsdtAddress: number): Uint8Array {
  const bytes = new Uint8Array(RSDP_SIZE);
  const view = new DataView(bytes.buffer);
  setAscii(view, 0, 'RSD PTR ');
  setAscii(view, 9, OEM_ID);
  view.setUint8(15, 2); // Revision: ACPI 2.0 and later
  view.setUint32(20, RSDP_SIZE, true);
  view.setBigUint64(24, BigInt(xsdtAddress), true); // and no RSDT
  view.setUint8(8, checksum(bytes.subarray(0, RSDP_V1_SIZE)));
  view.setUint8(32, checksum(bytes)); // Extended Checksum
  return bytes;
}

/** Extended System Description Table (section 5.2.8): the addresses of the tables but the DSDT. */
function xsdt(tables: readonly number[]): Uint8Array {
  const body = new DataView(new ArrayBuffer(8 * tables.length));
  tables.forEach((address, i) => {
    body.setBigUint64(8 * i, BigInt(address), true);
  });
  return systemTable('XSDT', 1, new Uint8Array(body.buffer));
}

/** Fixed ACPI Description Table (section 5.2.9), revision 6.4. */
function fadt(dsdtAddress: number): Uint8Array {
  const bytes = new Uint8Array(FADT.size);
  const view = new DataView(bytes.buffer);
  view.setUint8(FADT.century, CMOS_CENTURY);
  view.setUint16(FADT.bootArchitecture, BOOT_ARCHITECTURE.LEGACY_DEVICES | BOOT_ARCHITECTURE.NO_VGA, true);
  view.setUint32(
    FADT.flags,
    Object.values(FEATURES).reduce((all, flag) => all | flag),
    true,
  );
  setPort(view, FADT.resetRegister, ports.i8042.base + 4);
  view.setUint8(FADT.resetValue, RESET_PULSE);
  view.setUint8(FADT.minorVersion, 4);
  view.setBigUint64(FADT.xDsdt, BigInt(dsdtAddress), true);
  // Linux wants both registers to power off. They can be one: WAK_STS, the status register's only bit, is never set.
  setPort(view, FADT.sleepControl, ports.sleepControl.base);
  setPort(view, FADT.sleepStatus, ports.sleepControl.base);
  setAscii(view, FADT.hypervisor, 'TSVISOR ');
  return systemTable('FACP', 6, bytes.subarray(HEADER_SIZE));
}

/** Multiple APIC Description Table (section 5.2.12): CPU n has local APIC ID n; NMI is LINT1 of each. */
function madt(cpus: number): Uint8Array {
  const body: number[] = [...u32(layout.localApic), ...u32(1 /* PCAT_COMPAT: KVM's PIC */)];
  for (let id = 0; id < cpus; id++) body.push(LOCAL_APIC, 8, id, id, ...u32(1 /* enabled */));
  const ioapicId = cpus; // the first ID that no local APIC has
  body.push(IOAPIC, 12, ioapicId, 0, ...u32(layout.ioapic), ...u32(0 /* its first GSI */));
  body.push(LOCAL_APIC_NMI, 6, ALL_PROCESSORS, 0, 0, 1);
  return systemTable('APIC', 5, Uint8Array.from(body));
}

const OEM_ID = 'TSVISR';

/** A table with its header (section 5.2.6). */
function systemTable(signature: string, revision: number, body: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(HEADER_SIZE + body.length);
  const view = new DataView(bytes.buffer);
  setAscii(view, 0, signature);
  view.setUint32(4, bytes.length, true);
  view.setUint8(8, revision);
  setAscii(view, 10, OEM_ID);
  setAscii(view, 16, 'TSVISOR '); // OEM Table ID
  view.setUint32(24, 1, true); // OEM Revision
  setAscii(view, 28, 'TSVR'); // Creator ID
  view.setUint32(32, 1, true); // Creator Revision
  bytes.set(body, HEADER_SIZE);
  view.setUint8(9, checksum(bytes));
  return bytes;
}

/** A Generic Address Structure (section 5.2.3.2): a port of 8 bits, accessed by the byte. */
function setPort(view: DataView, offset: number, port: number): void {
  const SYSTEM_IO = 1;
  const BYTE_ACCESS = 1;
  for (const [i, value] of [SYSTEM_IO, 8 /* bits */, 0, BYTE_ACCESS].entries()) view.setUint8(offset + i, value);
  view.setBigUint64(offset + 4, BigInt(port), true);
}

function u32(value: number): number[] {
  return [value & 0xff, (value >>> 8) & 0xff, (value >>> 16) & 0xff, value >>> 24];
}

function align(size: number): number {
  return Math.ceil(size / ALIGNMENT) * ALIGNMENT;
}
