import { join, MAC } from './rig.js';

/** The guest that the tests play, and the host's end of its link. */
export const GUEST_IP = Uint8Array.of(10, 9, 0, 2);
export const HOST_IP = Uint8Array.of(10, 9, 0, 1);
export const UDP = 17;
export const TCP = 6;
/** Bytes of the Ethernet and the IPv4 header. */
export const TRANSPORT = 34;

/** The ones' complement sum of section 1 of RFC 1071, not complemented. */
export function sum(bytes: Uint8Array, start = 0): number {
  let total = start;
  for (let i = 0; i < bytes.length; i += 2) total += ((bytes[i] as number) << 8) | (bytes[i + 1] ?? 0);
  while (total > 0xffff) total = (total & 0xffff) + (total >>> 16);
  return total;
}

/** The sum of the pseudo header of a transport protocol. */
export function pseudoSum(from: Uint8Array, to: Uint8Array, protocol: number, length: number): number {
  return sum(join(from, to, Uint8Array.of(0, protocol, length >> 8, length & 0xff)));
}

/** An ARP reply of the guest: GUEST_IP is at MAC. */
export function arpReply(to: Uint8Array): Uint8Array {
  const fixed = Uint8Array.of(0, 1, 8, 0, 6, 4, 0, 2);
  return join(to, MAC, Uint8Array.of(8, 6), fixed, MAC, GUEST_IP, to, HOST_IP);
}

/** An IPv4 packet from the guest to the host. */
export function ipv4(to: Uint8Array, protocol: number, payload: Uint8Array): Uint8Array {
  const length = 20 + payload.length;
  const head = Uint8Array.of(
    0x45,
    0,
    length >> 8,
    length & 0xff,
    0,
    1,
    0,
    0,
    64,
    protocol,
    0,
    0,
    ...GUEST_IP,
    ...HOST_IP,
  );
  put16(head, 10, ~sum(head));
  return join(to, MAC, Uint8Array.of(8, 0), head, payload);
}

/** A UDP datagram of the guest, with its checksum as left to an offload: the pseudo header's sum. */
export function udp(to: Uint8Array, ports: readonly [from: number, to: number], data: Uint8Array): Uint8Array {
  const head = new Uint8Array(8);
  put16(head, 0, ports[0]);
  put16(head, 2, ports[1]);
  put16(head, 4, 8 + data.length);
  put16(head, 6, pseudoSum(GUEST_IP, HOST_IP, UDP, 8 + data.length));
  return ipv4(to, UDP, join(head, data));
}

export interface Segment {
  readonly ports: readonly [from: number, to: number];
  readonly sequence: number;
  readonly acknowledged: number;
  /** 2 SYN, 16 ACK, 8 PSH. */
  readonly flags: number;
  readonly data?: Uint8Array;
}

/** A TCP segment of the guest, with its checksum as left to an offload. */
export function tcp(to: Uint8Array, { ports, sequence, acknowledged, flags, data }: Segment): Uint8Array {
  const head = new Uint8Array(20);
  const view = new DataView(head.buffer);
  view.setUint16(0, ports[0]);
  view.setUint16(2, ports[1]);
  view.setUint32(4, sequence);
  view.setUint32(8, acknowledged);
  view.setUint16(12, (5 << 12) | flags);
  view.setUint16(14, 65_535);
  view.setUint16(16, pseudoSum(GUEST_IP, HOST_IP, TCP, 20 + (data?.length ?? 0)));
  return ipv4(to, TCP, join(head, data ?? new Uint8Array()));
}

export function u16(bytes: Uint8Array, offset: number): number {
  return ((bytes[offset] as number) << 8) | (bytes[offset + 1] as number);
}

export function u32(bytes: Uint8Array, offset: number): number {
  return u16(bytes, offset) * 65536 + u16(bytes, offset + 2);
}

function put16(bytes: Uint8Array, offset: number, value: number): void {
  bytes[offset] = value >>> 8;
  bytes[offset + 1] = value;
}
