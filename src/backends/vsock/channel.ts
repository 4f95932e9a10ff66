import type { FdEvents } from '../../machine/fd-events.js';
import { MessageStream } from '../message-stream.js';
import { decodeNotice, encodeNotice, HEADER_SIZE, MAX_PACKET, NOTICE_SIZE } from './packet.js';

const LIMITS = { header: HEADER_SIZE, shortest: NOTICE_SIZE, longest: MAX_PACKET };

/** The socket device's way to the host side of its connections, which is on the main thread: packets and notices. */
export class VsockChannel extends MessageStream {
  #generation = 0;
  /** The host side knows of the driver of now: what comes is meant for it. */
  #agreed = false;

  /** @param fd stays its opener's. */
  constructor(fd: number, events: FdEvents) {
    super(fd, events, LIMITS);
  }

  /** The guest's driver came or went: no connection from before is one any more. */
  setDriver(up: boolean): void {
    this.#generation = (this.#generation + 1) >>> 0;
    this.#agreed = false;
    this.announce(encodeNotice({ generation: this.#generation, up }));
  }

  /** The next packet for the driver of now; otherwise as MessageStream's. */
  override receive(): Uint8Array | undefined {
    for (let message = super.receive(); message; message = super.receive()) {
      if (message.length === NOTICE_SIZE) this.#agreed = decodeNotice(message).generation === this.#generation;
      else if (this.#agreed && message.length >= HEADER_SIZE) return message;
    }
    return undefined;
  }
}
