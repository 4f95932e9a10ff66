import type { GuestIo } from '../../backends/guest-io.js';
import type { Segments } from '../segments.js';

/** What a sender may leave to its receiver, as bits: the kernel's TUN_F_ numbers. */
export const Offload = {
  /** Frames whose last checksum is to be filled in. */
  checksum: 1,
  /** TCP segments longer than the link's, over IPv4 and IPv6, and those with CWR set. */
  tso4: 2,
  tso6: 4,
  ecn: 8,
} as const;

/**
 * `taken`: it is on its way. `full`: not now; the backend was not changed. `refused`: it will not be sent, now or later.
 */
export type SendResult = 'taken' | 'full' | 'refused';

/**
 * The host's end of a network device. It outlives the device: a guest's reset makes a new one on the same backend.
 * Nothing here waits. A frame is a virtio_net_hdr_v1 and Ethernet without its check sequence.
 */
export interface NetBackend {
  /** What both sides may leave to the other. */
  readonly offloads: number;
  /** Longest packet of the link in bytes, 68 to 65535, without the Ethernet header; undefined: the usual 1500. */
  readonly mtu: number | undefined;
  /** Whether there is another end still. It never comes back. */
  readonly up: boolean;
  /** receive() may find something; asked for by awaitReadable(). May be called without cause, as the others. */
  onReadable: () => void;
  /** send() may not be full any more; asked for by awaitWritable(). */
  onWritable: () => void;
  /** `up` is false now. */
  onDown: () => void;
  /** What frames that are received from now on may leave to the guest. */
  setOffloads(offloads: number): void;
  /** @param io of the guest whose memory holds the frame. */
  send(io: GuestIo, header: Uint8Array, frame: Segments): SendResult;
  awaitWritable(): void;
  /**
   * The next frame, or undefined when there is none now. It may be changed, and is valid until the next call; at least a
   * header long.
   */
  receive(): Uint8Array | undefined;
  awaitReadable(): void;
}
