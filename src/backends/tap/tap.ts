import { constants } from 'node:os';
import { addon } from '../../kvm/addon.js';
import type { FdEvents } from '../../machine/fd-events.js';
import { EBADFD } from '../../virtio/generated/virtio.js';
import { type NetBackend, Offload, type SendResult } from '../../virtio/net/backend.js';
import { HEADER_SIZE, MAX_FRAME } from '../../virtio/net/header.js';
import type { Segments } from '../../virtio/segments.js';
import { type GuestIo, IoOperation } from '../guest-io.js';
import { Readiness } from '../readiness.js';
import { openTap, setTapOffloads } from './open.js';

const { EAGAIN } = constants.errno;

/** A tap of the host: its kernel does checksums and segmentation that are left to it. */
export class Tap implements NetBackend, Disposable {
  readonly offloads = Offload.checksum | Offload.tso4 | Offload.tso6 | Offload.ecn;
  readonly mtu: number;
  onReadable = () => {};
  onWritable = () => {};
  onDown = () => {};
  readonly #fd: number;
  readonly #readiness: Readiness;
  /** A frame that fills it was longer. */
  readonly #frame = new Uint8Array(HEADER_SIZE + MAX_FRAME + 1);
  /** What the guest accepts; unknown of a tap that somebody else had. */
  #guestOffloads: number | undefined;
  #up = true;

  /** @throws NetworkError */
  constructor(name: string, events: FdEvents) {
    const { fd, mtu } = openTap(name);
    this.#fd = addon.adopt(fd);
    this.mtu = mtu;
    this.#readiness = new Readiness(
      fd,
      events,
      () => this.onReadable(),
      () => this.onWritable(),
    );
  }

  get up(): boolean {
    return this.#up;
  }

  setOffloads(offloads: number): void {
    // The kernel takes its lock of all network configuration: not as often as a guest resets its device.
    if (offloads === this.#guestOffloads) return;
    this.#guestOffloads = offloads;
    setTapOffloads(this.#fd, offloads); // the numbers are the same
  }

  send(io: GuestIo, header: Uint8Array, frame: Segments): SendResult {
    const result = io.transfer(IoOperation.write, this.#fd, -1, frame, 0, header);
    if (result >= 0) return 'taken';
    return result === -EAGAIN ? 'full' : 'refused';
  }

  awaitWritable(): void {
    this.#readiness.awaitWritable();
  }

  receive(): Uint8Array | undefined {
    if (!this.#up) return undefined;
    const count = addon.read(this.#fd, this.#frame, 0, this.#frame.length);
    if (count >= HEADER_SIZE) return this.#frame.subarray(0, count);
    if (count === -EBADFD) {
      this.#up = false; // the interface was deleted
      this.onDown();
    }
    return undefined;
  }

  awaitReadable(): void {
    if (this.#up) this.#readiness.awaitReadable();
  }

  [Symbol.dispose](): void {
    this.#readiness.close();
    addon.close(this.#fd);
  }
}
