import { NetHeader, NetHeaderFlag } from '../frame-stream-format.js';
import { BROADCAST, MTU } from './addresses.js';
import { put16, put32, u16, u32 } from './bytes.js';
import { pseudoHeaderSum, sum16 } from './checksum.js';
import type { Counters } from './counters.js';
import { EtherType, In, newFrame, Out } from './ethernet.js';
import { type Link, noOffload } from './link.js';

export const Protocol = { ICMP: 1, TCP: 6, UDP: 17 } as const;

/** Bytes of an IPv4 header without options. */
export const IPV4_SIZE = 20;
/** Where the payload of an IPv4 datagram is in a message for the guest. */
export const OUT_TRANSPORT = Out.PAYLOAD + IPV4_SIZE;

export const Fragment = { DONT: 0x4000, MORE: 0x2000, OFFSET_MASK: 0x1fff } as const;
const TTL = 64;
/** Payload of all fragments but the last: a multiple of eight. */
const FRAGMENT_PAYLOAD = (MTU - IPV4_SIZE) & ~7;

/** A datagram from the guest. There is one object, used again for each: nobody keeps it. */
export class Packet {
  bytes: Uint8Array = new Uint8Array(0);
  /** Its payload is bytes [start, end). */
  start = 0;
  end = 0;
  source = 0;
  destination = 0;
  protocol = 0;
  /** The transport's checksum is not complete, as the frame said: there is nothing to verify. */
  partial = false;

  /** Whether the checksum over pseudo-header and payload is right. */
  transportSumIsValid(): boolean {
    const length = this.end - this.start;
    const pseudo = pseudoHeaderSum(this.source, this.destination, this.protocol, length);
    const sum = pseudo + sum16(this.bytes, this.start, this.end);
    return sum === 0xffff || sum === 0x1fffe;
  }
}

/**
 * Takes the IPv4 packet of a frame.
 * @returns its flags and fragment offset; -1 when it was dropped and counted.
 */
export function parseIpv4(packet: Packet, bytes: Uint8Array, counters: Counters): number {
  const at = In.PAYLOAD;
  const available = bytes.length - at;
  const version = available < IPV4_SIZE ? 0 : (bytes[at] as number);
  const header = (version & 15) * 4;
  const total = version === 0 ? 0 : u16(bytes, at + 2);
  if (version >>> 4 !== 4 || header < IPV4_SIZE || total < header || total > available || bytes[at + 8] === 0) {
    counters.dropped.malformed++;
    return -1;
  }
  if (sum16(bytes, at, at + header) !== 0xffff) {
    counters.dropped.checksum++;
    return -1;
  }
  packet.bytes = bytes;
  packet.start = at + header;
  packet.end = at + total;
  packet.protocol = bytes[at + 9] as number;
  packet.source = u32(bytes, at + 12);
  packet.destination = u32(bytes, at + 16);
  return u16(bytes, at + 6);
}

/** Completes and sends IPv4 datagrams to the guest. */
export class Ipv4Output {
  readonly #link: Link;
  readonly #ask: (address: number) => void;
  #id = 0;

  /** @param ask asks the guest for its MAC. */
  constructor(link: Link, ask: (address: number) => void) {
    this.#link = link;
    this.#ask = ask;
  }

  /**
   * Sends a message whose payload is in place from OUT_TRANSPORT on (and in `parts`); its virtio header is set.
   * @param fragment flags and offset in units of eight bytes.
   */
  send(
    head: Buffer,
    source: number,
    destination: number,
    protocol: number,
    parts?: readonly Uint8Array[],
    partsLength = 0,
    id = this.nextId(),
    fragment: number = Fragment.DONT,
  ): void {
    const at = Out.PAYLOAD;
    head[at] = 0x45;
    head[at + 1] = 0;
    put16(head, at + 2, head.length - at + partsLength);
    put16(head, at + 4, id);
    put16(head, at + 6, fragment);
    head[at + 8] = TTL;
    head[at + 9] = protocol;
    put16(head, at + 10, 0);
    put32(head, at + 12, source);
    put32(head, at + 16, destination);
    put16(head, at + 10, ~sum16(head, at, at + IPV4_SIZE));
    if (!this.#link.guestKnown) this.#ask(destination);
    if (destination === BROADCAST) this.#link.broadcast(head, EtherType.IPV4);
    else this.#link.send(head, EtherType.IPV4, parts, partsLength);
  }

  /** Sends a message like `send` does, in fragments if it is above the MTU. Its checksums must then be complete. */
  sendDatagram(message: Buffer, source: number, destination: number, protocol: number): void {
    if (message.length <= Out.PAYLOAD + MTU) {
      this.send(message, source, destination, protocol);
      return;
    }
    const id = this.nextId();
    for (let at = OUT_TRANSPORT; at < message.length; at += FRAGMENT_PAYLOAD) {
      const end = Math.min(at + FRAGMENT_PAYLOAD, message.length);
      const frame = newFrame(IPV4_SIZE + end - at);
      noOffload(frame);
      message.copy(frame, OUT_TRANSPORT, at, end);
      const more = end < message.length ? Fragment.MORE : 0;
      this.send(frame, source, destination, protocol, undefined, 0, id, more | ((at - OUT_TRANSPORT) >>> 3));
    }
  }

  nextId(): number {
    this.#id = (this.#id + 1) & 0xffff;
    return this.#id;
  }
}

/** Sets the virtio header of a message to "the checksum is partial": the field holds the sum of the pseudo-header. */
export function needsChecksum(head: Uint8Array, checksumOffset: number): void {
  noOffload(head);
  const at = Out.NET_HEADER;
  const start = OUT_TRANSPORT - Out.ETHERNET;
  head[at + NetHeader.FLAGS] = NetHeaderFlag.NEEDS_CSUM;
  head[at + NetHeader.CSUM_START] = start;
  head[at + NetHeader.CSUM_OFFSET] = checksumOffset;
}
