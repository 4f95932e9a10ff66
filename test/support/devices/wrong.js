// @ts-check
import { MmioDevice, VirtioDevice } from 'tsvisor/device';

/** Classes that a machine refuses. */

export const notAClass = 42;

export class Stranger {
  read() {
    return 0;
  }
}

export class Throws extends MmioDevice {
  /** @param {import("tsvisor/device").MmioDeviceInit} init */
  constructor(init) {
    super(init);
    throw new RangeError(`not with ${init.options}`);
  }

  read() {
    return 0;
  }
}

export class Large extends MmioDevice {
  size = 2 ** 30;

  read() {
    return 0;
  }
}

export class NoType extends VirtioDevice {
  type = 0;
  queueSizes = [8];

  handleQueue() {}
}

/** Nothing is wrong with these, only there may be too many of them. */
export class Fine extends MmioDevice {
  size = 2 ** 20 + 1;

  read() {
    return 0;
  }
}

export class Silent extends Fine {
  /** @type {'none'} */
  trigger = 'none';
  size = 2 ** 24;
}

export class FineVirtio extends VirtioDevice {
  type = 42;
  queueSizes = [8];

  handleQueue() {}
}

export default MmioDevice;

export class NoQueues extends VirtioDevice {
  type = 4;
  /** @type {any} */
  queueSizes = undefined;

  handleQueue() {}
}
