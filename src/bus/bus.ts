import type { StateReader } from '../state-reader.js';

/** A device's state, for snapshots: what JSON can hold. */
export type DeviceState = object;

/**
 * A device that decodes accesses to a range of ports or of guest physical addresses. It must accept every offset,
 * length and value (the guest is hostile), answer reads it does not know with what is in `data` already (all ones), and
 * return promptly. It must not keep `data`.
 */
export interface BusDevice {
  readonly name: string;
  /** @param offset from the start of the range. @param data 1, 2, 4 or 8 bytes to fill, little-endian. */
  read(offset: number, data: Uint8Array): void;
  write(offset: number, data: Uint8Array): void;
  /** What a snapshot must carry of it, as JSON; absent where it has no state. */
  save?(): DeviceState;
  /** Takes over what save() gave, of a device as it is after power-on. @throws SnapshotError when it cannot be. */
  restore?(state: StateReader): void;
}

/** Where a device answers. */
export interface BusRange {
  readonly base: number;
  readonly length: number;
  readonly device: BusDevice;
}

/** Non-overlapping ranges of one address space, sorted. Reads that hit nothing give all ones; writes are dropped. */
export class Bus {
  readonly #name: string;
  readonly #ranges: BusRange[] = [];
  #last: BusRange | undefined;

  /** @param name for error messages: `port` or `MMIO`. */
  constructor(name: string) {
    this.#name = name;
  }

  get ranges(): readonly BusRange[] {
    return this.#ranges;
  }

  /** @throws Error when the range is empty or overlaps another: two devices at one address is a defect of the builder. */
  add(base: number, length: number, device: BusDevice): void {
    const clash = this.#ranges.find((r) => base < r.base + r.length && r.base < base + length);
    const range = Number.isSafeInteger(base) && Number.isSafeInteger(base + length) && base >= 0 && length > 0;
    if (clash || !range) {
      const why = clash ? `overlaps ${clash.device.name}` : 'is not a range';
      throw new Error(`${this.#name} range 0x${base.toString(16)}+${length} of ${device.name} ${why}`);
    }
    this.#ranges.push({ base, length, device });
    this.#ranges.sort((a, b) => a.base - b.base);
  }

  /** @returns whether a device answered. An access that starts in a device but runs past its end hits nothing. */
  read(address: number, data: Uint8Array): boolean {
    data.fill(0xff);
    const range = this.#find(address, data.length);
    if (!range) return false;
    range.device.read(address - range.base, data);
    return true;
  }

  write(address: number, data: Uint8Array): boolean {
    const range = this.#find(address, data.length);
    if (!range) return false;
    range.device.write(address - range.base, data);
    return true;
  }

  #find(address: number, length: number): BusRange | undefined {
    const last = this.#last;
    if (last && address >= last.base && address + length <= last.base + last.length) return last;
    let low = 0;
    let high = this.#ranges.length - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      const range = this.#ranges[middle] as BusRange;
      if (address < range.base) high = middle - 1;
      else if (address >= range.base + range.length) low = middle + 1;
      else {
        if (address + length > range.base + range.length) return undefined;
        this.#last = range;
        return range;
      }
    }
    return undefined;
  }
}
