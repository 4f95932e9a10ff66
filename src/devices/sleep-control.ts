import type { StateReader } from '../state-reader.js';
import { ByteDevice } from './byte-device.js';

/** SLP_TYPx in bits 4..2 and SLP_EN in bit 5. */
const SLP_TYP = 0x1c;
const SLP_EN = 0x20;

/** The SLP_TYP of soft off that the machine's \_S5 object names. */
export const SLP_TYP_S5 = 5;

/**
 * The sleep control register of hardware-reduced ACPI (ACPI 6.4 section 4.8.3.7): SLP_EN together with the SLP_TYP of S5
 * powers off. There are no other sleep states; SLP_EN reads as zero.
 */
export class SleepControl extends ByteDevice {
  readonly name = 'sleep-control';
  readonly #onPowerOff: () => void;
  #sleepType = 0;

  /** @param onPowerOff may be called again before the machine has stopped. */
  constructor(onPowerOff: () => void) {
    super();
    this.#onPowerOff = onPowerOff;
  }

  override readByte(offset: number): number {
    return offset === 0 ? this.#sleepType : 0xff;
  }

  override writeByte(offset: number, value: number): void {
    if (offset !== 0) return;
    this.#sleepType = value & SLP_TYP;
    if (value & SLP_EN && this.#sleepType >> 2 === SLP_TYP_S5) this.#onPowerOff();
  }

  reset(): void {
    this.#sleepType = 0;
  }

  save(): { readonly sleepType: number } {
    return { sleepType: this.#sleepType };
  }

  restore(state: StateReader): void {
    this.#sleepType = state.number('sleepType', 0, 0xff) & SLP_TYP;
  }
}
