import { Device, type DeviceHost, type DeviceInit } from './device.js';

export { feature } from '../virtio/device.js';

/** Guest memory of a request, in one run of bytes whatever it is made of. Empty once the chain has been given back. */
export interface Buffers {
  /** Bytes: 0 to 2^32. The guest chooses it: do not allocate as much without a limit of your own. */
  readonly length: number;
  /** Copies bytes out, from `offset` on. The guest may change them meanwhile. @returns how many there were. */
  read(offset: number, into: Uint8Array): number;
}

/** Buffers that the device may also fill. */
export interface WritableBuffers extends Buffers {
  /** Copies bytes in, from `offset` on. @returns how many there was room for. */
  write(offset: number, from: Uint8Array): number;
}

/**
 * A request of the driver: a descriptor chain, read once and checked (virtio 1.2 section 2.7). It may be kept and given
 * back much later. After a reset of the device it is empty, and to give it back has no effect. In a machine that goes on
 * from a snapshot, pop() first gives again what was kept when that was taken.
 */
export interface Chain {
  /** What the driver says. */
  readonly readable: Buffers;
  /** Where the device puts its answer. */
  readonly writable: WritableBuffers;
}

/** A virtqueue, as its device sees it. It is over with the next reset. */
export interface Queue {
  /** Number of descriptors that the driver chose; 0 when it does not use this queue. */
  readonly size: number;
  /** The next chain of the driver; undefined when there is none: then handleQueue() tells of the next. */
  pop(): Chain | undefined;
  /**
   * Gives a chain back, in any order.
   * @param written bytes that were stored from the start of chain.writable.
   * @throws RangeError when that is more than it has; Error for a chain of another queue, or one given back already.
   */
  push(chain: Chain, written: number): void;
  /** Shows the driver all that was pushed, and interrupts it if it wants that. Once for a batch. */
  publish(): void;
}

/** What a machine does for a virtio device. */
export interface VirtioDeviceHost extends DeviceHost {
  readonly queues: readonly Queue[];
  readonly accepted: bigint;
  /** Tells the driver that the configuration space has changed. */
  configChanged(): void;
}

/** What a VirtioDevice is made from: for a constructor to pass on. */
export type VirtioDeviceInit<Options = unknown> = DeviceInit<Options, VirtioDeviceHost>;

/**
 * A virtio device (virtio 1.2), on the MMIO transport: the guest finds it as it finds the machine's others. The
 * transport negotiates, checks rings and chains, and tells the device of requests.
 *
 * ```js
 * export default class Echo extends VirtioDevice {
 *   type = 42;
 *   queueSizes = [64];
 *   handleQueue(index) {
 *     const queue = this.queues[index];
 *     for (let chain = queue.pop(); chain; chain = queue.pop()) {
 *       const bytes = new Uint8Array(Math.min(chain.readable.length, 4096));
 *       chain.readable.read(0, bytes);
 *       queue.push(chain, chain.writable.write(0, bytes));
 *     }
 *     queue.publish();
 *   }
 * }
 * ```
 */
export abstract class VirtioDevice<Options = unknown> extends Device<Options, VirtioDeviceHost> {
  /** Device ID, 1 to 2^32 - 1 (virtio 1.2 section 5): which driver of the guest's takes it. */
  abstract readonly type: number;
  /** Greatest number of descriptors of each queue, 1 to 32 queues; powers of two up to 32768. */
  abstract readonly queueSizes: readonly number[];
  /** Features that the device offers: bits 0 to 23 and 50 to 127 (section 2.2); the transport adds its own. */
  readonly features: bigint = 0n;
  /** The configuration space, little-endian, at most 3840 bytes: what readConfig() reads unless it is overridden. */
  readonly config: Uint8Array = new Uint8Array();

  /** As many as queueSizes; none while no driver is ready. */
  get queues(): readonly Queue[] {
    return this.host.queues;
  }

  /** Features that driver and device agreed on; 0 while no driver is ready. */
  get accepted(): bigint {
    return this.host.accepted;
  }

  /** Tells the driver that the configuration space has changed. */
  configChanged(): void {
    this.host.configChanged();
  }

  /**
   * There may be something in a queue; also called for each queue once the driver is ready. May come without cause.
   * @param index in `queues`.
   */
  abstract handleQueue(index: number): void;

  /** Fills `out` from the configuration space; bytes past its end stay as they are. @param offset 0 or more. */
  readConfig(offset: number, out: Uint8Array): void {
    out.set(this.config.subarray(offset, offset + out.length));
  }

  /** The driver writes into the configuration space. */
  writeConfig(_offset: number, _data: Uint8Array): void {}

  /**
   * The driver starts anew, or the guest was reset: back to the state after power-on. The queues are over already, and
   * the chains that the device still has are empty. Called before each driver gets ready, so more than once.
   */
  override reset(): void {}
}
