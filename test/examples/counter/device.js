// @ts-check
import { MmioDevice } from 'tsvisor/device';

/** Registers, 32 bits each. */
const COUNT = 0x0; // read and write
const ALARM = 0x4; // read and write: the count at which the alarm goes off
const STATUS = 0x8; // read: 1 while the alarm is on; write 1: turn it off
const PERIOD = 0xc; // read and write: microseconds after which the count goes up by one by itself; 0: never

/**
 * A counter with an alarm: an interrupt, and a message to the program. The program may count too.
 * @extends {MmioDevice<{ alarm?: number } | undefined>}
 */
export default class Counter extends MmioDevice {
  size = 0x10;
  ticker = this.timer(() => {
    this.count(1);
    this.ticker.arm(this.period);
  });
  value = 0;
  alarm = this.options?.alarm ?? 0;
  period = 0;
  ringing = false;

  /** @param {number} offset */
  read(offset) {
    if (offset === COUNT) return this.value;
    if (offset === ALARM) return this.alarm;
    if (offset === STATUS) return this.ringing ? 1 : 0;
    return offset === PERIOD ? this.period : 0;
  }

  /** @param {number} offset @param {number} value */
  write(offset, value) {
    if (offset === COUNT) this.value = value;
    else if (offset === ALARM) this.alarm = value;
    else if (offset === STATUS && value === 1) this.ring(false);
    else if (offset === PERIOD) {
      this.period = value;
      if (value === 0) this.ticker.cancel();
      else this.ticker.arm(value);
    }
  }

  /** The program sends a number to add. @param {unknown} value */
  onMessage(value) {
    this.count(Number(value));
  }

  reset() {
    this.value = this.period = 0;
    this.alarm = this.options?.alarm ?? 0;
    this.ringing = false;
    this.ticker.cancel();
  }

  /** The interrupt is saved without it. */
  save() {
    const { value, alarm, period, ringing } = this;
    return { value, alarm, period, ringing };
  }

  /** @param {any} state of a snapshot, which may be anybody's */
  restore({ value, alarm, period, ringing }) {
    if (![value, alarm, period].every((n) => Number.isInteger(n) && n >= 0 && n < 2 ** 32)) {
      throw new RangeError('value, alarm or period is no number of 32 bits');
    }
    Object.assign(this, { value, alarm, period, ringing: ringing === true });
    if (period > 0) this.ticker.arm(period); // timers are not saved
  }

  /** @param {number} by */
  count(by) {
    this.value = (this.value + by) >>> 0;
    if (this.alarm === 0 || this.value < this.alarm || this.ringing) return;
    this.ring(true);
    this.channel.postMessage({ alarm: this.value });
  }

  /** @param {boolean} on */
  ring(on) {
    this.ringing = on;
    this.interrupt.set(on); // level-triggered: up until the guest has turned the alarm off
  }
}
