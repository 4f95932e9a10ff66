import {
  virtio_net_hdr_v1 as at,
  VIRTIO_NET_HDR_F_DATA_VALID,
  VIRTIO_NET_HDR_F_NEEDS_CSUM,
  VIRTIO_NET_HDR_GSO_ECN,
  VIRTIO_NET_HDR_GSO_NONE,
  VIRTIO_NET_HDR_GSO_TCPV4,
  VIRTIO_NET_HDR_GSO_TCPV6,
} from '../generated/virtio.js';
import { Offload } from './backend.js';

export const HEADER_SIZE = at.sizeof;
/** Ethernet header: two addresses and a type. */
export const ETHERNET_HEADER = 14;
/** Ethernet, the longest IP packet and a byte: what buffers of 65562 bytes hold (virtio 1.2 section 5.1.6.3.1). */
export const MAX_FRAME = 65_550;

/**
 * Checks the header of a frame that the guest sends, and leaves in it only what its flags give a meaning (virtio 1.2
 * section 5.1.6.2).
 * @param length bytes of the frame without the header.
 * @param allowed offloads that were negotiated.
 * @returns false when the frame asks for what it may not, or its fields point outside it.
 */
export function checkTransmitHeader(header: Uint8Array, length: number, allowed: number): boolean {
  const partial = ((header[at.flags] as number) & VIRTIO_NET_HDR_F_NEEDS_CSUM) !== 0;
  header[at.flags] = partial ? VIRTIO_NET_HDR_F_NEEDS_CSUM : 0;
  if (partial) {
    if (!(allowed & Offload.checksum)) return false;
    if (u16(header, at.csum_start) + u16(header, at.csum_offset) + 2 > length) return false;
  } else {
    setU16(header, at.csum_start, 0);
    setU16(header, at.csum_offset, 0);
  }
  const gso = header[at.gso_type] as number;
  if (gso === VIRTIO_NET_HDR_GSO_NONE) {
    setU16(header, at.gso_size, 0);
  } else if (!partial || !gsoAllowed(gso, allowed) || u16(header, at.gso_size) === 0) {
    return false;
  }
  // A hint that must not be relied on (5.1.6.2.2), but a tap takes it for true.
  if (u16(header, at.hdr_len) > length) setU16(header, at.hdr_len, length);
  setU16(header, at.num_buffers, 0);
  return true;
}

/**
 * Checks the header of a frame for the guest (virtio 1.2 section 5.1.6.4.1).
 * @returns false when it needs what the driver did not accept: one from before the device was reset.
 */
export function checkReceiveHeader(header: Uint8Array, allowed: number): boolean {
  const flags = header[at.flags] as number;
  if (allowed & Offload.checksum) {
    header[at.flags] = flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID);
  } else {
    if (flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) return false;
    header[at.flags] = 0;
  }
  return isWhole(header) || gsoAllowed(header[at.gso_type] as number, allowed);
}

/** Whether a frame is one packet of the link, not several that are still to be cut. */
export function isWhole(header: Uint8Array): boolean {
  return header[at.gso_type] === VIRTIO_NET_HDR_GSO_NONE;
}

export function setBufferCount(header: Uint8Array, count: number): void {
  setU16(header, at.num_buffers, count);
}

function gsoAllowed(gso: number, allowed: number): boolean {
  if (gso & VIRTIO_NET_HDR_GSO_ECN && !(allowed & Offload.ecn)) return false;
  const type = gso & ~VIRTIO_NET_HDR_GSO_ECN;
  if (type === VIRTIO_NET_HDR_GSO_TCPV4) return (allowed & Offload.tso4) !== 0;
  return type === VIRTIO_NET_HDR_GSO_TCPV6 && (allowed & Offload.tso6) !== 0;
}

function u16(bytes: Uint8Array, offset: number): number {
  return (bytes[offset] as number) | ((bytes[offset + 1] as number) << 8);
}

function setU16(bytes: Uint8Array, offset: number, value: number): void {
  bytes[offset] = value;
  bytes[offset + 1] = value >>> 8;
}
