/** Frames as a guest would build and read them: written apart from the code under test, plainly, to check it. */

export const GUEST_MAC = Buffer.from([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);
export const NETWORK_MAC = Buffer.from([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]);
export const BROADCAST_MAC = Buffer.alloc(6, 0xff);
export const GUEST = '10.0.2.15';
export const GATEWAY = '10.0.2.2';
export const DNS = '10.0.2.3';

export function ip(text: string): Buffer {
  return Buffer.from(text.split('.').map(Number));
}

/** RFC 1071, a byte pair at a time; 0 over data with a right checksum. */
export function checksum(...parts: Uint8Array[]): number {
  const bytes = Buffer.concat(parts);
  let sum = 0;
  for (let i = 0; i < bytes.length; i += 2) {
    sum += (bytes[i] as number) * 256 + (bytes[i + 1] ?? 0);
    if (sum > 0xffff) sum -= 0xffff;
  }
  return 0xffff - sum;
}

function pseudoHeader(source: Uint8Array, destination: Uint8Array, protocol: number, length: number): Buffer {
  return Buffer.from([...source, ...destination, 0, protocol, length >> 8, length & 255]);
}

export function ethernet(
  type: number,
  payload: Uint8Array,
  destination: Uint8Array = NETWORK_MAC,
  source = GUEST_MAC,
): Buffer {
  return Buffer.concat([destination, source, Buffer.from([type >> 8, type & 255]), payload]);
}

export interface Ipv4Options {
  source?: string;
  id?: number;
  /** Flags and offset. */
  fragment?: number;
  options?: Uint8Array;
  ttl?: number;
}

export function ipv4(destination: string, protocol: number, payload: Uint8Array, options: Ipv4Options = {}): Buffer {
  const extra = options.options ?? Buffer.alloc(0);
  const header = Buffer.alloc(20 + extra.length);
  header[0] = 0x40 | (header.length / 4);
  header.writeUInt16BE(header.length + payload.length, 2);
  header.writeUInt16BE(options.id ?? 1, 4);
  header.writeUInt16BE(options.fragment ?? 0x4000, 6);
  header[8] = options.ttl ?? 64;
  header[9] = protocol;
  ip(options.source ?? GUEST).copy(header, 12);
  ip(destination).copy(header, 16);
  header.set(extra, 20);
  header.writeUInt16BE(checksum(header), 10);
  return Buffer.concat([header, payload]);
}

function withChecksum(segment: Buffer, at: number, source: string, destination: string, protocol: number): Buffer {
  segment.writeUInt16BE(0, at);
  const sum = checksum(pseudoHeader(ip(source), ip(destination), protocol, segment.length), segment);
  segment.writeUInt16BE(sum || (protocol === 17 ? 0xffff : 0), at);
  return segment;
}

/** A whole IPv4 datagram with UDP in it. */
export function udp(
  destination: string,
  destinationPort: number,
  sourcePort: number,
  payload: Uint8Array,
  options: Ipv4Options = {},
): Buffer {
  return ipv4(destination, 17, udpPayload(destination, destinationPort, sourcePort, payload, options.source), options);
}

export function udpPayload(
  destination: string,
  destinationPort: number,
  sourcePort: number,
  payload: Uint8Array,
  source = GUEST,
): Buffer {
  const segment = Buffer.alloc(8 + payload.length);
  segment.writeUInt16BE(sourcePort, 0);
  segment.writeUInt16BE(destinationPort, 2);
  segment.writeUInt16BE(segment.length, 4);
  segment.set(payload, 8);
  return withChecksum(segment, 6, source, destination, 17);
}

export const FIN = 1;
export const SYN = 2;
export const RST = 4;
export const PSH = 8;
export const ACK = 16;

export interface TcpFields {
  sourcePort: number;
  destinationPort: number;
  sequence: number;
  acknowledgement?: number;
  flags: number;
  window?: number;
  options?: Uint8Array;
  payload?: Uint8Array;
}

/** A whole IPv4 datagram with TCP in it. */
export function tcp(destination: string, fields: TcpFields, source = GUEST, partial = false): Buffer {
  const options = fields.options ?? Buffer.alloc(0);
  const payload = fields.payload ?? Buffer.alloc(0);
  const segment = Buffer.alloc(20 + options.length + payload.length);
  segment.writeUInt16BE(fields.sourcePort, 0);
  segment.writeUInt16BE(fields.destinationPort, 2);
  segment.writeUInt32BE(fields.sequence >>> 0, 4);
  segment.writeUInt32BE((fields.acknowledgement ?? 0) >>> 0, 8);
  segment[12] = ((20 + options.length) / 4) << 4;
  segment[13] = fields.flags;
  segment.writeUInt16BE(fields.window ?? 65535, 14);
  segment.set(options, 20);
  segment.set(payload, 20 + options.length);
  if (!partial) withChecksum(segment, 16, source, destination, 6);
  return ipv4(destination, 6, segment, { source });
}

export function icmpEcho(destination: string, id: number, sequence: number, payload: Uint8Array): Buffer {
  const message = Buffer.concat([Buffer.from([8, 0, 0, 0, id >> 8, id & 255, sequence >> 8, sequence & 255]), payload]);
  message.writeUInt16BE(checksum(message), 2);
  return ipv4(destination, 1, message);
}

export function arp(operation: number, sender: string, target: string): Buffer {
  return Buffer.concat([
    Buffer.from([0, 1, 8, 0, 6, 4, 0, operation]),
    GUEST_MAC,
    ip(sender),
    Buffer.alloc(6),
    ip(target),
  ]);
}

export interface Frame {
  /** virtio_net_hdr_v1. */
  flags: number;
  gsoType: number;
  hdrLen: number;
  gsoSize: number;
  csumStart: number;
  csumOffset: number;
  numBuffers: number;
  destinationMac: Buffer;
  sourceMac: Buffer;
  type: number;
  payload: Buffer;
}

export interface Datagram {
  frame: Frame;
  source: string;
  destination: string;
  protocol: number;
  id: number;
  fragment: number;
  payload: Buffer;
}

export interface TcpSegment {
  datagram: Datagram;
  sourcePort: number;
  destinationPort: number;
  sequence: number;
  acknowledgement: number;
  flags: number;
  window: number;
  options: Buffer;
  payload: Buffer;
}

export function parseFrame(bytes: Buffer): Frame {
  return {
    flags: bytes.readUInt8(0),
    gsoType: bytes.readUInt8(1),
    hdrLen: bytes.readUInt16LE(2),
    gsoSize: bytes.readUInt16LE(4),
    csumStart: bytes.readUInt16LE(6),
    csumOffset: bytes.readUInt16LE(8),
    numBuffers: bytes.readUInt16LE(10),
    destinationMac: bytes.subarray(12, 18),
    sourceMac: bytes.subarray(18, 24),
    type: bytes.readUInt16BE(24),
    payload: bytes.subarray(26),
  };
}

/** @throws when the header is not right in every respect. */
export function parseIpv4(frame: Frame): Datagram {
  const { payload } = frame;
  if (payload[0] !== 0x45) throw new Error(`IPv4 header begins with ${payload[0]}`);
  if (checksum(payload.subarray(0, 20)) !== 0) throw new Error('wrong IPv4 header checksum');
  if (payload.readUInt16BE(2) !== payload.length) throw new Error('IPv4 length is not that of the frame');
  if (payload[8] !== 64) throw new Error('wrong TTL');
  return {
    frame,
    source: [...payload.subarray(12, 16)].join('.'),
    destination: [...payload.subarray(16, 20)].join('.'),
    protocol: payload.readUInt8(9),
    id: payload.readUInt16BE(4),
    fragment: payload.readUInt16BE(6),
    payload: payload.subarray(20),
  };
}

/** @throws when a checksum is wrong, or a virtio header does not describe its packet, given what the guest accepts. */
export function checkTransport(datagram: Datagram, offloads: number): void {
  const { frame, payload, protocol } = datagram;
  const describe = () => JSON.stringify({ ...frame, payload: undefined, protocol, length: payload.length });
  if (frame.numBuffers !== 1) throw new Error(`num_buffers: ${describe()}`);
  const pseudo = pseudoHeader(ip(datagram.source), ip(datagram.destination), protocol, payload.length);
  if (frame.flags === 0) {
    if (frame.gsoType || frame.hdrLen || frame.gsoSize || frame.csumStart || frame.csumOffset) {
      throw new Error(`virtio header not clear: ${describe()}`);
    }
    if (frame.payload.length > 1500) throw new Error(`above the MTU: ${describe()}`);
    if (protocol !== 1 && checksum(pseudo, payload) !== 0) throw new Error(`wrong checksum: ${describe()}`);
    if (protocol === 17 && payload.readUInt16BE(6) === 0) throw new Error(`no checksum: ${describe()}`);
    if (protocol === 1 && checksum(payload) !== 0) throw new Error(`wrong ICMP checksum: ${describe()}`);
    return;
  }
  if (frame.flags !== 1 || !(offloads & 1)) throw new Error(`offload that the guest does not accept: ${describe()}`);
  const offset = protocol === 6 ? 16 : 6;
  if (frame.csumStart !== 34 || frame.csumOffset !== offset) throw new Error(`csum fields: ${describe()}`);
  if (payload.readUInt16BE(offset) !== 0xffff - checksum(pseudo)) throw new Error(`pseudo-header sum: ${describe()}`);
  if (frame.gsoType === 0) {
    if (frame.gsoSize || frame.payload.length > 1500) throw new Error(`large without GSO: ${describe()}`);
    return;
  }
  const header = ((payload[12] as number) >> 4) * 4;
  const data = payload.length - header;
  if (frame.gsoType !== 1 || !(offloads & 2) || protocol !== 6) throw new Error(`GSO not accepted: ${describe()}`);
  if (frame.hdrLen !== 34 + header || frame.gsoSize < 536 || frame.gsoSize > 1460 || data <= frame.gsoSize) {
    throw new Error(`GSO fields: ${describe()}`);
  }
}

export function parseTcp(datagram: Datagram): TcpSegment {
  const { payload } = datagram;
  const header = (payload.readUInt8(12) >> 4) * 4;
  return {
    datagram,
    sourcePort: payload.readUInt16BE(0),
    destinationPort: payload.readUInt16BE(2),
    sequence: payload.readUInt32BE(4),
    acknowledgement: payload.readUInt32BE(8),
    flags: payload.readUInt8(13),
    window: payload.readUInt16BE(14),
    options: payload.subarray(20, header),
    payload: payload.subarray(header),
  };
}
