import type { OneShotTimer } from '../../devices/host.js';
import type { VirtioContext, VirtioModel } from '../device.js';
import { VIRTIO_ID_RNG } from '../generated/virtio.js';
import type { Virtqueue } from '../queue.js';

/** Most bytes of one request that are filled; a driver asks again for the rest (section 5.4.6.2: at least one byte). */
const MAX_REQUEST = 4096;
/** What may be had at once after a pause, in seconds of the rate. */
const BURST_SECONDS = 1;

export interface RngOptions {
  /** Bytes a second that the guest gets in the long run; at least 1. */
  readonly bytesPerSecond: number;
  /** Milliseconds on a monotonic clock. */
  readonly now: () => number;
  readonly timer: (onExpired: () => void) => OneShotTimer;
}

/**
 * Entropy device (virtio 1.2 section 5.4): fills buffers from the host's random number generator, no faster than its
 * rate. Requests that come too early wait in the queue.
 */
export class Rng implements VirtioModel {
  readonly name = 'rng';
  readonly type = VIRTIO_ID_RNG;
  readonly queueSizes = [64];
  readonly features = 0n;
  readonly #rate: number;
  readonly #now: () => number;
  readonly #timer: OneShotTimer;
  /** Loaded only where there is such a device. */
  readonly #randomFill = process.getBuiltinModule('node:crypto').randomFillSync;
  readonly #bytes = new Uint8Array(MAX_REQUEST);
  #queue: Virtqueue | undefined;
  #credit: number;
  #creditAt: number;

  constructor({ bytesPerSecond, now, timer }: RngOptions) {
    this.#rate = bytesPerSecond;
    this.#now = now;
    this.#timer = timer(() => this.handleQueue());
    this.#credit = this.#capacity;
    this.#creditAt = now();
  }

  readConfig(): void {}

  activate({ queues }: VirtioContext): void {
    this.#queue = queues[0];
  }

  handleQueue(): void {
    const queue = this.#queue;
    if (!queue) return;
    this.#refill();
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      const wanted = Math.min(chain.writable.length, MAX_REQUEST);
      if (wanted > this.#credit) {
        queue.unpop(chain);
        this.#timer.arm(Math.ceil(((wanted - this.#credit) / this.#rate) * 1e6));
        break;
      }
      this.#credit -= wanted;
      this.#randomFill(this.#bytes, 0, wanted);
      queue.push(chain, chain.writable.write(0, this.#bytes.subarray(0, wanted)));
    }
    queue.publish();
  }

  reset(): void {
    this.#queue = undefined;
  }

  get #capacity(): number {
    return Math.max(MAX_REQUEST, this.#rate * BURST_SECONDS);
  }

  #refill(): void {
    const now = this.#now();
    this.#credit = Math.min(this.#capacity, this.#credit + ((now - this.#creditAt) / 1e3) * this.#rate);
    this.#creditAt = now;
  }
}
