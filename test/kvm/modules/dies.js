// @ts-check
import { MmioDevice } from 'tsvisor/device';

/** @extends {MmioDevice<unknown>} */
export default class Dies extends MmioDevice {
  read() {
    return 0;
  }

  /** The machine thread ends with it. */
  write() {
    process.exit(3);
  }
}
