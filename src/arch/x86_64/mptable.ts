import { IOAPIC_PINS, layout } from '../../machine/layout.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { checksum, setAscii } from './table-bytes.js';

// Intel MultiProcessor Specification 1.4, chapter 4.
const FLOATING_POINTER_SIZE = 16; // table 4-1
const HEADER_SIZE = 44; // table 4-2
const PROCESSOR_SIZE = 20; // table 4-4
const ENTRY_SIZE = 8; // every other entry

const PROCESSOR = 0;
const BUS = 1;
const IOAPIC = 2;
const IO_INTERRUPT = 3;
const LOCAL_INTERRUPT = 4;

const INTERRUPT_INT = 0; // table 4-10
const INTERRUPT_NMI = 1;
const INTERRUPT_EXTINT = 3;

const SPEC_REVISION = 4; // 1.4
const ISA_BUS = 0;
const ALL_LOCAL_APICS = 0xff;
const LOCAL_APIC_VERSION = 0x14; // what KVM's local APIC reports
const IOAPIC_VERSION = 0x11; // what KVM's IOAPIC reports

// PO and EL of an interrupt's flags (table 4-10): as the bus has it, or active high and level-triggered.
const CONFORMS_TO_BUS = 0b0000;
const LEVEL_ACTIVE_HIGH = 0b1101;

const FIXED_ENTRIES = 1 /* bus */ + 1 /* IOAPIC */ + 2; /* LINT0, LINT1 */

/** An IOAPIC pin that something drives. */
export interface IoapicPin {
  /** 0 to 23, each once. */
  readonly pin: number;
  /** Level-triggered, active high; otherwise edge-triggered and active high, as ISA is. */
  readonly level: boolean;
}

/**
 * Writes the MP floating pointer structure into the last KiB of base memory, which is one of the places an OS searches
 * (section 4), and the configuration table that it points to. CPU n has local APIC ID n and the first is the bootstrap
 * processor; one IOAPIC; one ISA bus, whose interrupt n is IOAPIC pin n, the PIT's too: KVM has it at pin 0, not 2; the
 * PIC on LINT0 of the first CPU and NMI on LINT1 of each.
 * @param cpus 1 to MAX_CPUS
 * @param pins in use: Linux sets up each pin that is listed, 3 to 10 ms where KVM interprets the guest's kernel
 */
export function writeMpTable(memory: GuestMemory, cpus: number, pins: readonly IoapicPin[]): void {
  const numbers = new Set(pins.map(({ pin }) => pin));
  if (
    numbers.size !== pins.length ||
    [...numbers].some((pin) => !Number.isInteger(pin) || pin < 0 || pin >= IOAPIC_PINS)
  ) {
    throw new RangeError(
      `IOAPIC pins ${pins.map(({ pin }) => pin)}: each must be one of 0 to ${IOAPIC_PINS - 1}, once`,
    );
  }
  const entries = FIXED_ENTRIES + pins.length;
  const tableLength = HEADER_SIZE + cpus * PROCESSOR_SIZE + entries * ENTRY_SIZE;

  const pointer = new DataView(new ArrayBuffer(FLOATING_POINTER_SIZE));
  setAscii(pointer, 0, '_MP_');
  pointer.setUint32(4, layout.mpTable, true); // PHYSICAL ADDRESS POINTER
  pointer.setUint8(8, FLOATING_POINTER_SIZE / 16); // LENGTH, in paragraphs
  pointer.setUint8(9, SPEC_REVISION);
  // Feature bytes 1 (no default configuration: read the table) and 2 (no IMCR: virtual wire mode) stay 0.
  pointer.setUint8(10, checksum(bytesOf(pointer)));
  memory.write(layout.mpPointer, bytesOf(pointer));

  const table = new DataView(new ArrayBuffer(tableLength));
  setAscii(table, 0, 'PCMP');
  table.setUint16(4, tableLength, true); // BASE TABLE LENGTH
  table.setUint8(6, SPEC_REVISION);
  setAscii(table, 8, 'TSVISOR '); // OEM ID
  setAscii(table, 16, 'TSVISOR     '); // PRODUCT ID
  table.setUint16(34, cpus + entries, true); // ENTRY COUNT
  table.setUint32(36, layout.localApic, true);

  let at = HEADER_SIZE;
  for (let id = 0; id < cpus; id++, at += PROCESSOR_SIZE) {
    table.setUint8(at, PROCESSOR);
    table.setUint8(at + 1, id); // LOCAL APIC ID
    table.setUint8(at + 2, LOCAL_APIC_VERSION);
    table.setUint8(at + 3, id === 0 ? 0b11 : 0b01); // CPU FLAGS: EN, and BP for the first
    table.setUint32(at + 4, 0x600, true); // CPU SIGNATURE: family 6 (table 4-5)
    table.setUint32(at + 8, 0x201, true); // FEATURE FLAGS: FPU, APIC (table 4-6)
  }
  const entry = (...fields: number[]) => {
    fields.forEach((value, i) => {
      table.setUint8(at + i, value);
    });
    at += ENTRY_SIZE;
  };
  const ioapicId = cpus; // the first ID that no local APIC has
  entry(BUS, ISA_BUS, ...[...'ISA   '].map((c) => c.charCodeAt(0)));
  table.setUint32(at + 4, layout.ioapic, true); // its MEMORY-MAPPED ADDRESS, after the four bytes that follow
  entry(IOAPIC, ioapicId, IOAPIC_VERSION, 1 /* EN */);
  for (const { pin, level } of pins) {
    const flags = level ? LEVEL_ACTIVE_HIGH : CONFORMS_TO_BUS;
    entry(IO_INTERRUPT, INTERRUPT_INT, flags, 0, ISA_BUS, pin, ioapicId, pin);
  }
  entry(LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0);
  entry(LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1);
  table.setUint8(7, checksum(bytesOf(table)));
  memory.write(layout.mpTable, bytesOf(table));
}

function bytesOf({ buffer }: DataView): Uint8Array {
  return new Uint8Array(buffer);
}
