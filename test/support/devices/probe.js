// @ts-check
import { GuestMemory, GuestMemoryRangeError, MmioDevice } from 'tsvisor/device';

/**
 * An MMIO device for bare guests. Written: 0 raises the interrupt, 4 lowers it, 8 pulses it, 0xc posts as many messages
 * as the value, 0x10 throws, 0x14 arms the timer for so many microseconds, which raises the interrupt. Read: 0 how many
 * resets there were, 4 messages refused, 8 what the program sent last, 0xc how often there was room again, 0x10 whether
 * guest memory and its errors are of the public classes.
 */
export default class Probe extends MmioDevice {
  size = 0x20;
  resets = 0;
  refused = 0;
  drained = 0;
  last = 0;
  clock = this.timer(() => this.interrupt.set(true));

  /** @param {number} offset */
  read(offset) {
    if (offset === 0x10) return Number(this.#knowsClasses());
    return [this.resets, this.refused, this.last, this.drained][offset >> 2] ?? 0;
  }

  #knowsClasses() {
    try {
      this.memory.readU8(2 ** 40);
      return false;
    } catch (error) {
      return error instanceof GuestMemoryRangeError && this.memory instanceof GuestMemory;
    }
  }

  /** @param {number} offset @param {number} value */
  write(offset, value) {
    if (offset === 0) this.interrupt.set(true);
    else if (offset === 4) this.interrupt.set(false);
    else if (offset === 8) this.interrupt.pulse();
    else if (offset === 0xc) for (let n = 0; n < value; n++) this.refused += this.channel.postMessage(n) ? 0 : 1;
    else if (offset === 0x10) throw new Error(`the guest wrote ${value}`);
    else if (offset === 0x14) this.clock.arm(value);
  }

  /** @param {unknown} value */
  onMessage(value) {
    this.last = Number(value);
  }

  onDrain() {
    this.drained++;
  }

  reset() {
    this.resets++;
  }
}

export class EdgeProbe extends Probe {
  /** @type {'edge'} */
  trigger = 'edge';
}
