/**
 * What the socket device and the host side of its connections say to each other over a stream socket: messages as
 * frame-stream-format.ts has them, none of them a control message. A message is a packet, which is a virtio_vsock_hdr
 * (virtio 1.2 section 5.10.6) and its payload, or a notice: the guest's driver came or went. The host side answers a
 * notice with the same one; what it had sent before is not for the driver of now, and the device drops it.
 */
import { virtio_vsock_hdr as at } from '../../virtio/generated/virtio.js';
import { LENGTH_SIZE, putFrameLength } from '../frame-stream-format.js';

export const HEADER_SIZE = at.sizeof;
/** Most bytes of payload in a packet, as Linux has it (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE). */
export const MAX_PAYLOAD = 65_536;
export const MAX_PACKET = HEADER_SIZE + MAX_PAYLOAD;
/** The host's address (section 5.10.4). */
export const HOST_CID = 2;
/** A port that is none: "any" in the socket API. */
export const ANY_PORT = 0xffff_ffff;

/** Bytes of a notice: a number that counts them, and whether there is a driver. */
export const NOTICE_SIZE = 5;

export interface Notice {
  readonly generation: number;
  readonly up: boolean;
}

/** A notice as a whole message. */
export function encodeNotice({ generation, up }: Notice): Uint8Array {
  const message = Buffer.alloc(LENGTH_SIZE + NOTICE_SIZE);
  putFrameLength(message, 0, NOTICE_SIZE);
  message.writeUInt32LE(generation, LENGTH_SIZE);
  message[LENGTH_SIZE + 4] = up ? 1 : 0;
  return message;
}

/** @param bytes as many as NOTICE_SIZE. */
export function decodeNotice(bytes: Uint8Array): Notice {
  return { generation: view(bytes).getUint32(0, true), up: bytes[4] === 1 };
}

/** A packet's header; every field is unsigned. Its CIDs are left out: one is the host's, the other the guest's. */
export interface PacketHeader {
  readonly srcPort: number;
  readonly dstPort: number;
  readonly type: number;
  readonly op: number;
  readonly flags: number;
  readonly bufAlloc: number;
  readonly fwdCnt: number;
}

/** @param bytes at least HEADER_SIZE. */
export function decodeHeader(bytes: Uint8Array): PacketHeader {
  const header = view(bytes);
  return {
    srcPort: header.getUint32(at.src_port, true),
    dstPort: header.getUint32(at.dst_port, true),
    type: header.getUint16(at.type, true),
    op: header.getUint16(at.op, true),
    flags: header.getUint32(at.flags, true),
    bufAlloc: header.getUint32(at.buf_alloc, true),
    fwdCnt: header.getUint32(at.fwd_cnt, true),
  };
}

/** The beginning of a message: its length and the header of a packet from the host. */
export function encodeHeader(guestCid: number, header: PacketHeader, length: number): Uint8Array {
  const message = Buffer.alloc(LENGTH_SIZE + HEADER_SIZE);
  putFrameLength(message, 0, HEADER_SIZE + length);
  const to = new DataView(message.buffer, message.byteOffset + LENGTH_SIZE, HEADER_SIZE);
  to.setUint32(at.src_cid, HOST_CID, true);
  to.setUint32(at.dst_cid, guestCid, true);
  to.setUint32(at.src_port, header.srcPort, true);
  to.setUint32(at.dst_port, header.dstPort, true);
  to.setUint32(at.len, length, true);
  to.setUint16(at.type, header.type, true);
  to.setUint16(at.op, header.op, true);
  to.setUint32(at.flags, header.flags, true);
  to.setUint32(at.buf_alloc, header.bufAlloc, true);
  to.setUint32(at.fwd_cnt, header.fwdCnt, true);
  return message;
}

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
}
