// @ts-check
import { MmioDevice } from 'tsvisor/device';

let devices = 0;

/** Tells how many of its kind its thread has had. @extends {MmioDevice<unknown>} */
export default class MarksThread extends MmioDevice {
  count = ++devices;

  read() {
    return this.count;
  }

  write() {}
}
