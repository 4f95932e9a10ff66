import { SLP_TYP_S5 } from '../../../devices/sleep-control.js';
import { gsi, ports } from '../../../machine/layout.js';
import {
  type Aml,
  device,
  eisaId,
  integer,
  interrupt,
  ioPorts,
  memory32,
  name,
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
  /** Its interrupt, level-triggered and active high; devices may share one. */
  readonly gsi: number;
}

/** The DSDT's definition block: the devices that no bus can enumerate, and the sleep type of soft off. */
export function definitionBlock(hardware: { serial: boolean; virtio: readonly VirtioSlot[] }): Uint8Array {
  const devices = [realTimeClock(), ...(hardware.serial ? [serialPort()] : []), ...hardware.virtio.map(virtioMmio)];
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
    name('_CRS', resourceTemplate(memory32(base, length), interrupt(gsi, 'level'))),
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

/** Without an interrupt, as the device raises none. If this were not here, Linux would ask for ISA's 8 in vain. */
function realTimeClock(): Aml {
  const { base, length } = ports.cmos;
  return device('RTC_', name('_HID', eisaId('PNP0B00')), name('_CRS', resourceTemplate(ioPorts(base, length))));
}
