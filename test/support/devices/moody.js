// @ts-check
import { MmioDevice } from 'tsvisor/device';

/** Counts what it is told, and tells the count when asked. Told `throw`, it cannot be saved until it is told more. */
export default class Moody extends MmioDevice {
  /** @type {'none'} */
  trigger = 'none';
  count = 0;
  last = '';

  read() {
    return 0;
  }

  /** @param {unknown} value */
  onMessage(value) {
    this.count++;
    this.last = String(value);
    if (value === 'ask') this.channel.postMessage(this.count);
  }

  save() {
    if (this.last === 'throw') throw new Error('not now');
    return this.count;
  }

  /** @param {unknown} state */
  restore(state) {
    this.count = Number(state);
  }
}

export class Sulky extends Moody {
  restore() {
    throw new Error('never again');
  }
}
