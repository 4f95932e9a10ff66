import { LENGTH_SIZE, NET_HEADER_SIZE } from '../frame-stream-format.js';

export const EtherType = { IPV4: 0x0800, ARP: 0x0806, IPV6: 0x86dd } as const;

/** Destination, source and type. */
export const ETHERNET_SIZE = 14;

/** Where things are in a frame from the guest: a virtio_net_hdr_v1 and an Ethernet frame. */
export const In = {
  DESTINATION: NET_HEADER_SIZE,
  SOURCE: NET_HEADER_SIZE + 6,
  TYPE: NET_HEADER_SIZE + 12,
  PAYLOAD: NET_HEADER_SIZE + ETHERNET_SIZE,
} as const;

/** Where things are in a message for the guest, which begins with its length. */
export const Out = {
  NET_HEADER: LENGTH_SIZE,
  ETHERNET: LENGTH_SIZE + NET_HEADER_SIZE,
  PAYLOAD: LENGTH_SIZE + NET_HEADER_SIZE + ETHERNET_SIZE,
} as const;

/** A message for the guest with room for `payload` bytes after the Ethernet header. Nothing of it is written yet. */
export function newFrame(payload: number): Buffer {
  return Buffer.allocUnsafe(Out.PAYLOAD + payload);
}
