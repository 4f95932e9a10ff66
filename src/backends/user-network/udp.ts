import { GuestOffload } from '../frame-stream-format.js';
import { MTU } from './addresses.js';
import { put16, u16 } from './bytes.js';
import { fold, pseudoHeaderSum, sum16 } from './checksum.js';
import type { Counters } from './counters.js';
import { newFrame } from './ethernet.js';
import { IPV4_SIZE, type Ipv4Output, needsChecksum, OUT_TRANSPORT, type Packet, Protocol } from './ipv4.js';
import { type Link, noOffload } from './link.js';

export const UDP_SIZE = 8;
const CHECKSUM = 6;

/** A datagram from the guest. There is one object, used again for each. */
export interface Datagram {
  source: number;
  sourcePort: number;
  destination: number;
  destinationPort: number;
  /** A view of the frame. */
  payload: Uint8Array;
}

const datagram: Datagram = { source: 0, sourcePort: 0, destination: 0, destinationPort: 0, payload: new Uint8Array(0) };

/** @returns undefined when the packet was dropped and counted. The result is valid until the next call. */
export function parseUdp(packet: Packet, counters: Counters): Datagram | undefined {
  const { bytes, start } = packet;
  const available = packet.end - start;
  const length = available < UDP_SIZE ? 0 : u16(bytes, start + 4);
  if (length < UDP_SIZE || length > available || u16(bytes, start) === 0 || u16(bytes, start + 2) === 0) {
    counters.dropped.malformed++;
    return undefined;
  }
  packet.end = start + length;
  if (u16(bytes, start + CHECKSUM) !== 0 && !packet.partial && !packet.transportSumIsValid()) {
    counters.dropped.checksum++;
    return undefined;
  }
  datagram.source = packet.source;
  datagram.destination = packet.destination;
  datagram.sourcePort = u16(bytes, start);
  datagram.destinationPort = u16(bytes, start + 2);
  datagram.payload = bytes.subarray(start + UDP_SIZE, packet.end);
  return datagram;
}

export class UdpOutput {
  readonly #link: Link;
  readonly #ip: Ipv4Output;

  constructor(link: Link, ip: Ipv4Output) {
    this.#link = link;
    this.#ip = ip;
  }

  /** Sends a datagram to the guest; the payload is copied. */
  send(source: number, sourcePort: number, destination: number, destinationPort: number, payload: Uint8Array): void {
    const length = UDP_SIZE + payload.length;
    const message = newFrame(IPV4_SIZE + length);
    const at = OUT_TRANSPORT;
    put16(message, at, sourcePort);
    put16(message, at + 2, destinationPort);
    put16(message, at + 4, length);
    put16(message, at + CHECKSUM, 0);
    message.set(payload, at + UDP_SIZE);
    const pseudo = pseudoHeaderSum(source, destination, Protocol.UDP, length);
    if (this.#link.offloads & GuestOffload.CHECKSUM && length <= MTU - IPV4_SIZE) {
      needsChecksum(message, CHECKSUM);
      put16(message, at + CHECKSUM, pseudo);
    } else {
      noOffload(message);
      const sum = ~fold(pseudo + sum16(message, at, message.length)) & 0xffff;
      put16(message, at + CHECKSUM, sum || 0xffff); // 0 would say that there is none (RFC 768)
    }
    this.#ip.sendDatagram(message, source, destination, Protocol.UDP);
  }
}
