import type { FdEvents } from '../machine/fd-events.js';
import type { NetBackend } from '../virtio/net/backend.js';
import { encodeOffloads, MAX_FRAME_LENGTH, NET_HEADER_SIZE } from './frame-stream-format.js';
import { MessageStream } from './message-stream.js';

const LIMITS = { header: NET_HEADER_SIZE, shortest: NET_HEADER_SIZE, longest: MAX_FRAME_LENGTH };

/** A network whose host side is at the other end of a stream socket: on the main thread, the user-mode network or a FramePort. */
export class FrameStream extends MessageStream implements NetBackend {
  readonly offloads: number;
  readonly mtu = undefined;
  /** What the guest accepts; none before anything is said of it. */
  #guestOffloads = 0;

  /**
   * @param fd stays its opener's.
   * @param offloads what the other end and the guest may leave to each other.
   */
  constructor(fd: number, events: FdEvents, offloads: number) {
    super(fd, events, LIMITS);
    this.offloads = offloads;
  }

  setOffloads(offloads: number): void {
    if (offloads === this.#guestOffloads) return;
    this.#guestOffloads = offloads;
    this.announce(encodeOffloads(offloads)); // the numbers are the same
  }
}
