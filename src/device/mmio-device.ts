import { Device, type DeviceHost, type DeviceInit } from './device.js';

/** The interrupt line of a device. Nothing happens while no machine is powered on. */
export interface Interrupt {
  /** Raises or lowers the line. A level-triggered device keeps it up until its driver has dealt with the cause. */
  set(level: boolean): void;
  /** Up and down again: what an edge-triggered device does for each event. */
  pulse(): void;
}

/** What a machine does for an MMIO device. */
export interface MmioDeviceHost extends DeviceHost {
  readonly interrupt: Interrupt;
}

/** What an MmioDevice is made from: for a constructor to pass on. */
export type MmioDeviceInit<Options = unknown> = DeviceInit<Options, MmioDeviceHost>;

/**
 * A device with registers in a range of guest physical addresses and an interrupt of its own. The guest is told of it
 * on its kernel's command line: `tsvisor.device=NAME@0xADDRESS:GSI`.
 *
 * ```js
 * export default class Dice extends MmioDevice {
 *   read(offset) {
 *     return offset === 0 ? 1 + Math.floor(6 * Math.random()) : 0;
 *   }
 * }
 * ```
 */
export abstract class MmioDevice<Options = unknown> extends Device<Options, MmioDeviceHost> {
  /** Bytes of address space: 4 to 2^24. The range starts at a multiple of the next power of two, or of 4096. */
  readonly size: number = 4096;
  /** How its interrupt is triggered; `none` when it has none. */
  readonly trigger: 'level' | 'edge' | 'none' = 'level';

  /** The device's interrupt. */
  get interrupt(): Interrupt {
    return this.host.interrupt;
  }

  /**
   * The guest reads. It may read anywhere in the range, aligned or not; an access of 8 bytes comes as two of 4, the
   * lower one first, and one of an odd length in pieces.
   * @param offset from the start of the range. @param size 1, 2 or 4 bytes.
   * @returns the value, little-endian; of a number that needs more bytes the low ones. A device that was stopped reads
   * as all ones.
   */
  abstract read(offset: number, size: 1 | 2 | 4): number;

  /** The guest writes a value from 0 to 2^(8 × size) - 1, where and how it likes, as with read(). */
  write(_offset: number, _value: number, _size: 1 | 2 | 4): void {}
}
