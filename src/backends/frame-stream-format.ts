/**
 * What a virtio-net device and the host side of its network say to each other over a byte stream. A message is a
 * big-endian 32-bit word and then a body. The word's top bit clear: the word is the length of a frame, which is a
 * virtio_net_hdr_v1 (virtio 1.2 section 5.1.6) and an Ethernet frame without its FCS. Top bit set: the other bits are the
 * length of a control message, whose first byte is its type; only the device sends those. (vsock has messages of the
 * same form: see vsock/packet.ts.)
 */

/** Bytes of the word before each message. */
export const LENGTH_SIZE = 4;
export const NET_HEADER_SIZE = 12;
/** The longest frame in bytes, virtio_net_hdr_v1 included; a longer one means that the stream is broken. */
export const MAX_FRAME_LENGTH = NET_HEADER_SIZE + 65550;
export const MAX_CONTROL_LENGTH = 64;
const CONTROL_BIT = 0x8000_0000;

/** Byte offsets in virtio_net_hdr_v1; all fields of two bytes are little-endian. */
export const NetHeader = {
  FLAGS: 0,
  GSO_TYPE: 1,
  HDR_LEN: 2,
  GSO_SIZE: 4,
  CSUM_START: 6,
  CSUM_OFFSET: 8,
  NUM_BUFFERS: 10,
} as const;

export const NetHeaderFlag = { NEEDS_CSUM: 1, DATA_VALID: 2 } as const;
export const GsoType = { NONE: 0, TCPV4: 1, UDP: 3, TCPV6: 4, ECN: 0x80 } as const;

export const ControlType = {
  /** The second byte is a mask of GuestOffload: what the guest accepts from now on. */
  OFFLOADS: 1,
} as const;

export const GuestOffload = {
  /** Partial checksums (VIRTIO_NET_F_GUEST_CSUM). */
  CHECKSUM: 1,
  /** TCPv4 segments above the MTU (VIRTIO_NET_F_GUEST_TSO4). */
  TSO4: 2,
} as const;

/** Writes the word before a frame of `length` bytes. */
export function putFrameLength(into: Uint8Array, offset: number, length: number): void {
  into[offset] = length >>> 24;
  into[offset + 1] = length >>> 16;
  into[offset + 2] = length >>> 8;
  into[offset + 3] = length;
}

/** A whole control message: what the guest accepts. */
export function encodeOffloads(mask: number): Uint8Array {
  return Uint8Array.of(CONTROL_BIT >>> 24, 0, 0, 2, ControlType.OFFLOADS, mask);
}

export interface FrameStreamSink {
  /** A frame, not longer than the decoder allows; it may be too short to be one. */
  frame(bytes: Uint8Array): void;
  /** A control message, type byte included. */
  control(bytes: Uint8Array): void;
}

/** Cuts a byte stream into messages. What lies whole in a chunk is passed on as a view of it, the rest is copied once. */
export class FrameStreamDecoder {
  readonly #sink: FrameStreamSink;
  readonly #allocate: (length: number) => Uint8Array;
  readonly #longest: number;
  /** The bytes of a length word so far, and how many of them there are. */
  #word = 0;
  #wordBytes = 0;
  /** The message of which a chunk brought only a part. */
  #partial: Uint8Array | undefined;
  #partialLength = 0;
  #broken = false;

  /**
   * @param allocate memory for a message that spans chunks; it is used until the message was passed on.
   * @param longest bytes of a frame.
   */
  constructor(
    sink: FrameStreamSink,
    allocate: (length: number) => Uint8Array = Buffer.allocUnsafeSlow,
    longest = MAX_FRAME_LENGTH,
  ) {
    this.#sink = sink;
    this.#allocate = allocate;
    this.#longest = longest;
  }

  /** Takes the next bytes. @returns false when the stream is broken: a length cannot be right. It stays so. */
  push(chunk: Uint8Array): boolean {
    let at = 0;
    while (!this.#broken && at < chunk.length) {
      if (this.#wordBytes < LENGTH_SIZE) {
        this.#word = ((this.#word << 8) | (chunk[at++] as number)) >>> 0;
        if (++this.#wordBytes < LENGTH_SIZE) continue;
        this.#broken = this.#length > (this.#isControl ? MAX_CONTROL_LENGTH : this.#longest);
        if (this.#broken || this.#length > 0) continue;
      }
      at += this.#body(chunk, at);
    }
    return !this.#broken;
  }

  get #isControl(): boolean {
    return this.#word >= CONTROL_BIT;
  }

  get #length(): number {
    return this.#word % CONTROL_BIT;
  }

  /** @returns how many bytes of the chunk belong to the message. */
  #body(chunk: Uint8Array, at: number): number {
    const length = this.#length;
    const available = chunk.length - at;
    if (!this.#partial) {
      if (available >= length) {
        this.#deliver(chunk.subarray(at, at + length));
        return length;
      }
      this.#partial = this.#allocate(length);
      this.#partialLength = 0;
    }
    const partial = this.#partial;
    const count = Math.min(available, length - this.#partialLength);
    partial.set(chunk.subarray(at, at + count), this.#partialLength);
    this.#partialLength += count;
    if (this.#partialLength === length) {
      this.#partial = undefined;
      this.#deliver(partial);
    }
    return count;
  }

  #deliver(bytes: Uint8Array): void {
    const control = this.#isControl;
    this.#word = 0;
    this.#wordBytes = 0;
    if (control) this.#sink.control(bytes);
    else this.#sink.frame(bytes);
  }
}
