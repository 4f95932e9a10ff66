import { SLP_TYP_S5 } from '../../../devices/sleep-control.js';
import { gsi, layout, ports } from '../../../machine/layout.js';
import {
  type Aml,
  device,
  eisaId,
  integer,
  interrupt,
  ioPorts,
  memory32,
  method,
  name,
  notify,
  packageOf,
  resourceTemplate,
  scope,
  string,
} from './aml.js';

/** Where a virtio-mmio device is. */
export interface VirtioSlot {
  /** Guest physical address and length of its registers, below 4 GiB. */
  readonly base: number;
  readonly length: number;
  /**
   * Its interrupt, edge-triggered and active high. Not level-triggered: some nested KVMs end an interrupt as they deliver
   * it, and then deliver it again, since its line is still up.
   */
  readonly gsi: number;
}

/** The DSDT's definition block: the devices that no bus can enumerate, and the sleep type of soft off. */
export function definitionBlock(hardware: { serial: boolean; virtio: readonly VirtioSlot[] }): Uint8Array {
  const devices = [
    realTimeClock(),
    ...(hardware.serial ? [serialPort()] : []),
    generationId(),
    eventDevice(),
    ...hardware.virtio.map(virtioMmio),
  ];
  // \_S5 (section 7.4.2.6): SLP_TYPa, SLP_TYPb, two reserved. Hardware-reduced ACPI uses the first.
  const softOff = packageOf(integer(SLP_TYP_S5), integer(SLP_TYP_S5), integer(0), integer(0));
  return Uint8Array.from([...scope('\\_SB_', ...devices), ...name('\\_S5_', softOff)]);
}

/** LNRO0005 is what Linux's virtio_mmio goes by. On x86 a device without _CCA is cache-coherent (section 6.2.17). */
function virtioMmio({ base, length, gsi }: VirtioSlot, index: number): Aml {
  return device(
    `V${index.toString(16).toUpperCase().padStart(3, '0')}`,
    name('_HID', string('LNRO0005')),
    name('_UID', integer(index)),
    name('_CRS', resourceTemplate(memory32(base, length), interrupt(gsi, 'edge'))),
  );
}

/** Linux knows the UART without it, but not its interrupt: hardware-reduced ACPI has no ISA interrupts. */
function serialPort(): Aml {
  const { base, length } = ports.serial;
  return device(
    'COM1',
    name('_HID', eisaId('PNP0501')),
    name('_UID', integer(0)),
    name('_CRS', resourceTemplate(ioPorts(base, length), interrupt(gsi.serial, 'edge'))),
  );
}

const GENERATION_ID = 'VGEN';
const GENERATION_ID_CHANGED = 0x80;

/**
 * Microsoft's "Virtual Machine Generation ID" (2012): 16 bytes that are others in each machine that goes on from a
 * snapshot. Linux's vmgenid, since 5.18, goes by either name; so do Windows by the first and FreeBSD.
 */
function generationId(): Aml {
  return device(
    GENERATION_ID,
    name('_HID', string('TSVG0001')),
    name('_CID', packageOf(string('VM_Gen_Counter'), string('VMGENCTR'))),
    name('_DDN', string('VM_Gen_Counter')),
    name('ADDR', packageOf(integer(layout.vmGenerationId), integer(0))), // its lower and its upper half
  );
}

/** A Generic Event Device (section 5.6.9): what interrupts mean where there is no SCI. */
function eventDevice(): Aml {
  return device(
    'GED_',
    name('_HID', string('ACPI0013')),
    name('_UID', integer(0)),
    name('_CRS', resourceTemplate(interrupt(gsi.vmGenerationId, 'edge'))),
    method('_EVT', 1, notify(GENERATION_ID, GENERATION_ID_CHANGED)),
  );
}

/** Without an interrupt, as the device raises none. If this were not here, Linux would ask for ISA's 8 in vain. */
function realTimeClock(): Aml {
  const { base, length } = ports.cmos;
  return device('RTC_', name('_HID', eisaId('PNP0B00')), name('_CRS', resourceTemplate(ioPorts(base, length))));
}
