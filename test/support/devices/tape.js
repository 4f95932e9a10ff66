// @ts-check
import { MmioDevice } from 'tsvisor/device';

/**
 * Reads as 0, 1, 2, … byte by byte, wherever it is read, and wants to be written so; says when it has come to NOTICE, of
 * reads and of writes. A read of four bytes gives how many bytes were written that were not the next.
 */
export default class Tape extends MmioDevice {
  size = 0x10000;
  /** @type {'none'} */
  trigger = 'none';
  static NOTICE = 5000;
  reads = 0;
  writes = 0;
  wrong = 0;

  /** @param {number} _offset @param {number} size */
  read(_offset, size) {
    if (size === 4) return this.wrong;
    if (++this.reads === Tape.NOTICE) this.channel.postMessage('read');
    return (this.reads - 1) & 0xff;
  }

  /** @param {number} offset @param {number} value */
  write(offset, value) {
    if (++this.writes === Tape.NOTICE) this.channel.postMessage('written');
    if (value !== ((this.writes - 1) & 0xff) || offset !== this.writes - 1) this.wrong++;
  }

  save() {
    const { reads, writes, wrong } = this;
    return { reads, writes, wrong };
  }

  /** @param {unknown} state */
  restore(state) {
    Object.assign(this, state);
  }
}
