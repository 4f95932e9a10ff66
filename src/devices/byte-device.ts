import type { BusDevice } from '../bus/bus.js';

/**
 * A device whose registers are one byte wide. A wider access becomes byte accesses at consecutive offsets, lowest first,
 * as the ISA bus does for an 8-bit device that does not drive IOCS16#.
 */
export abstract class ByteDevice implements BusDevice {
  abstract readonly name: string;

  /** @param offset any non-negative integer. @returns 0..255; 0xff where there is no register. */
  abstract readByte(offset: number): number;

  /** @param offset any non-negative integer. @param value 0..255. */
  abstract writeByte(offset: number, value: number): void;

  read(offset: number, data: Uint8Array): void {
    for (let i = 0; i < data.length; i++) data[i] = this.readByte(offset + i);
  }

  write(offset: number, data: Uint8Array): void {
    for (let i = 0; i < data.length; i++) this.writeByte(offset + i, data[i] as number);
  }
}
