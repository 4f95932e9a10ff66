// @ts-check
import { VirtioDevice } from 'tsvisor/device';

/** A virtio device that hands its driver's requests to the program, one message each, and gives the answers back. */

/** Device ID of the 9P transport. */
const VIRTIO_ID_9P = 9;
const VIRTIO_9P_MOUNT_TAG = 0;
/** Longest request that is taken; the server tells the driver of a lower limit. */
const MAX_REQUEST = 64 * 1024;

/** @extends {VirtioDevice<{ tag: string }>} */
export default class NineP extends VirtioDevice {
  type = VIRTIO_ID_9P;
  queueSizes = [128];
  features = 1n << BigInt(VIRTIO_9P_MOUNT_TAG);
  config = mountTag(this.options.tag);
  /** Requests that the program has still to answer. @type {Map<number, import('tsvisor/device').Chain>} */
  open = new Map();
  nextId = 0;

  handleQueue() {
    const queue = this.queues[0];
    for (let chain = queue?.pop(); chain; chain = queue?.pop()) {
      const request = new Uint8Array(Math.min(chain.readable.length, MAX_REQUEST));
      chain.readable.read(0, request);
      const id = this.nextId++;
      this.open.set(id, chain);
      // Never refused: a queue has fewer chains than may be on their way.
      this.channel.postMessage({ id, request, room: chain.writable.length });
    }
  }

  /** @param {any} message */
  onMessage({ id, reply }) {
    const chain = this.open.get(id);
    if (!chain) return; // the driver was reset since
    this.open.delete(id);
    const queue = this.queues[0];
    queue?.push(chain, chain.writable.write(0, reply));
    queue?.publish();
  }

  reset() {
    this.open.clear();
  }
}

/** struct virtio_9p_config: the tag's length in 16 bits, then its bytes. @param {string} tag */
function mountTag(tag) {
  const bytes = Buffer.from(tag);
  return Uint8Array.of(bytes.length & 0xff, bytes.length >> 8, ...bytes);
}
