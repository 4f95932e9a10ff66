import type { BusDevice, DeviceState } from '../../bus/bus.js';
import type { MmioDevice, MmioDeviceHost } from '../../device/mmio-device.js';
import type { StateReader } from '../../state-reader.js';
import { type Power, settled, UserDevice } from './user-device.js';

const MIN_SIZE = 4;
const MAX_SIZE = 2 ** 24;
const TRIGGERS = ['level', 'edge', 'none'];

/** A user's MMIO device, on the bus. */
export class UserMmio extends UserDevice<MmioDevice> implements BusDevice, MmioDeviceHost {
  readonly interrupt = { set: (level: boolean) => this.#setLevel(Boolean(level)), pulse: () => this.#pulse() };
  size = 0;
  trigger: MmioDevice['trigger'] = 'none';
  #level = false;

  /** Says what is wrong with a device; undefined when nothing is. */
  static problem({ size, trigger, read }: MmioDevice): string | undefined {
    if (!(Number.isInteger(size) && size >= MIN_SIZE && size <= MAX_SIZE))
      return `size: ${size} is not ${MIN_SIZE} to ${MAX_SIZE}`;
    if (!TRIGGERS.includes(trigger)) return `trigger: ${trigger} is not ${TRIGGERS.join(', ')}`;
    return typeof read === 'function' ? undefined : 'read: it has no such method';
  }

  override adopt(device: MmioDevice): void {
    super.adopt(device);
    this.size = device.size;
    this.trigger = device.trigger;
  }

  read(offset: number, data: Uint8Array): void {
    for (let at = 0; at < data.length; ) {
      const size = pieceOf(data.length - at);
      const from = at;
      const value = this.guard(() => Number(settled(this.device.read(offset + from, size))));
      if (value === undefined) return; // all ones, as the bus filled it
      for (let i = 0; i < size; i++) data[at + i] = value >>> (8 * i);
      at += size;
    }
  }

  write(offset: number, data: Uint8Array): void {
    for (let at = 0; at < data.length; ) {
      const size = pieceOf(data.length - at);
      let value = 0;
      for (let i = size - 1; i >= 0; i--) value = value * 256 + (data[at + i] as number);
      const from = at;
      this.guard(() => this.device.write(offset + from, value, size));
      at += size;
    }
  }

  /** @throws DeviceError */
  save(): DeviceState {
    return { ...this.saveDevice(), level: this.#level };
  }

  restore(state: StateReader): void {
    const level = state.boolean('level');
    if (this.trigger === 'level') this.#setLevel(level);
    else this.#level = level; // up again, it would be an event
    this.restoreDevice(state);
  }

  override powerOn(power: Power): void {
    super.powerOn(power);
    this.#level = false;
  }

  override powerOff(): void {
    super.powerOff();
    this.stopped = false;
    this.guard(() => this.device.reset());
  }

  protected onFailure(why: string): void {
    this.#setLevel(false);
    this.warn(`device ${this.name}: ${why}; it does nothing until the guest is reset`);
  }

  #setLevel(level: boolean): void {
    if (!this.power || level === this.#level) return;
    this.#level = level;
    this.power.setInterrupt(level);
  }

  #pulse(): void {
    this.#setLevel(true);
    this.#setLevel(false);
  }
}

/** The next piece of an access of so many bytes. */
function pieceOf(left: number): 1 | 2 | 4 {
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}
