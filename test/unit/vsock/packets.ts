import * as abi from '#dist/virtio/generated/virtio.js';

/** A packet of either side; the fields of virtio_vsock_hdr (virtio 1.2 section 5.10.6), CIDs as 64 bits. */
export interface Packet {
  readonly srcCid: bigint;
  readonly dstCid: bigint;
  readonly srcPort: number;
  readonly dstPort: number;
  readonly len: number;
  readonly type: number;
  readonly op: number;
  readonly flags: number;
  readonly bufAlloc: number;
  readonly fwdCnt: number;
  readonly payload: Uint8Array;
}

export const Op = {
  INVALID: abi.VIRTIO_VSOCK_OP_INVALID,
  REQUEST: abi.VIRTIO_VSOCK_OP_REQUEST,
  RESPONSE: abi.VIRTIO_VSOCK_OP_RESPONSE,
  RST: abi.VIRTIO_VSOCK_OP_RST,
  SHUTDOWN: abi.VIRTIO_VSOCK_OP_SHUTDOWN,
  RW: abi.VIRTIO_VSOCK_OP_RW,
  CREDIT_UPDATE: abi.VIRTIO_VSOCK_OP_CREDIT_UPDATE,
  CREDIT_REQUEST: abi.VIRTIO_VSOCK_OP_CREDIT_REQUEST,
} as const;
export const Shutdown = { RCV: abi.VIRTIO_VSOCK_SHUTDOWN_RCV, SEND: abi.VIRTIO_VSOCK_SHUTDOWN_SEND, BOTH: 3 } as const;
export const STREAM = abi.VIRTIO_VSOCK_TYPE_STREAM;
export const HEADER = 44;
export const GUEST_CID = 3;
export const NOTHING = new Uint8Array();

/** The bytes of a packet of the guest to the host, unless its fields say otherwise. */
export function packet(fields: Partial<Packet>): Uint8Array {
  const payload = fields.payload ?? NOTHING;
  const bytes = new Uint8Array(HEADER + payload.length);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, fields.srcCid ?? BigInt(GUEST_CID), true);
  view.setBigUint64(8, fields.dstCid ?? 2n, true);
  view.setUint32(16, fields.srcPort ?? 1000, true);
  view.setUint32(20, fields.dstPort ?? 2000, true);
  view.setUint32(24, fields.len ?? payload.length, true);
  view.setUint16(28, fields.type ?? STREAM, true);
  view.setUint16(30, fields.op ?? Op.RW, true);
  view.setUint32(32, fields.flags ?? 0, true);
  view.setUint32(36, fields.bufAlloc ?? 65_536, true);
  view.setUint32(40, fields.fwdCnt ?? 0, true);
  bytes.set(payload, HEADER);
  return bytes;
}

export function parsePacket(bytes: Uint8Array): Packet {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  return {
    srcCid: view.getBigUint64(0, true),
    dstCid: view.getBigUint64(8, true),
    srcPort: view.getUint32(16, true),
    dstPort: view.getUint32(20, true),
    len: view.getUint32(24, true),
    type: view.getUint16(28, true),
    op: view.getUint16(30, true),
    flags: view.getUint32(32, true),
    bufAlloc: view.getUint32(36, true),
    fwdCnt: view.getUint32(40, true),
    payload: bytes.slice(HEADER),
  };
}

/** Bytes that tell one place from another. */
export function pattern(length: number, seed = 0): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => Math.imul(i + seed * 7919, 2654435761) >>> 24);
}

/** A message of the stream between device and main thread: its length, big-endian, and the bytes. */
export function message(bytes: Uint8Array): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(bytes.length);
  return Buffer.concat([length, bytes]);
}

/** A notice: the guest's driver came or went. */
export function notice(generation: number, up: boolean): Uint8Array {
  const bytes = Buffer.alloc(5);
  bytes.writeUInt32LE(generation);
  bytes[4] = up ? 1 : 0;
  return bytes;
}

/** Takes whole messages out of a stream's chunks. */
export class Messages {
  #bytes = Buffer.alloc(0);

  push(chunk: Uint8Array): Uint8Array[] {
    this.#bytes = Buffer.concat([this.#bytes, chunk]);
    const whole: Uint8Array[] = [];
    for (;;) {
      const end = this.#bytes.length < 4 ? Number.POSITIVE_INFINITY : 4 + this.#bytes.readUInt32BE();
      if (end > this.#bytes.length) return whole;
      whole.push(Uint8Array.from(this.#bytes.subarray(4, end)));
      this.#bytes = this.#bytes.subarray(end);
    }
  }
}
