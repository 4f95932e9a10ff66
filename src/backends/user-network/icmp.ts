import { DNS_SERVER, GATEWAY } from './addresses.js';
import { put16, put32 } from './bytes.js';
import { sum16 } from './checksum.js';
import type { Counters } from './counters.js';
import { newFrame } from './ethernet.js';
import { IPV4_SIZE, type Ipv4Output, OUT_TRANSPORT, type Packet, Protocol } from './ipv4.js';
import { noOffload } from './link.js';

const HEADER = 8;
const Type = { ECHO_REPLY: 0, UNREACHABLE: 3, ECHO_REQUEST: 8 } as const;

/** Codes of "destination unreachable" (RFC 792, RFC 1812). */
export const Unreachable = { NET: 0, HOST: 1, PROHIBITED: 13 } as const;

/** Answers echo requests for the network's own addresses, and tells the guest what cannot be reached. */
export class Icmp {
  readonly #ip: Ipv4Output;
  readonly #counters: Counters;

  constructor(ip: Ipv4Output, counters: Counters) {
    this.#ip = ip;
    this.#counters = counters;
  }

  input(packet: Packet): void {
    const { bytes, start, end, source, destination } = packet;
    const { dropped } = this.#counters;
    if (end - start < HEADER) {
      dropped.malformed++;
    } else if (sum16(bytes, start, end) !== 0xffff) {
      dropped.checksum++;
    } else if (bytes[start] !== Type.ECHO_REQUEST || bytes[start + 1] !== 0) {
      dropped.unsupported++;
    } else if (destination !== GATEWAY && destination !== DNS_SERVER) {
      dropped.unreachable++; // raw sockets need privilege
    } else {
      const reply = newFrame(IPV4_SIZE + end - start);
      noOffload(reply);
      reply.set(bytes.subarray(start, end), OUT_TRANSPORT);
      reply[OUT_TRANSPORT] = Type.ECHO_REPLY;
      putChecksum(reply);
      this.#ip.sendDatagram(reply, destination, source, Protocol.ICMP);
    }
  }

  /**
   * Says that a datagram did not arrive.
   * @param first at least the first 8 bytes of its payload, which name the flow.
   */
  unreachable(code: number, source: number, destination: number, protocol: number, first: Uint8Array): void {
    const message = newFrame(IPV4_SIZE + HEADER + IPV4_SIZE + 8).fill(0, OUT_TRANSPORT);
    noOffload(message);
    message[OUT_TRANSPORT] = Type.UNREACHABLE;
    message[OUT_TRANSPORT + 1] = code;
    const quoted = OUT_TRANSPORT + HEADER;
    message[quoted] = 0x45;
    put16(message, quoted + 2, IPV4_SIZE + 8);
    message[quoted + 8] = 1;
    message[quoted + 9] = protocol;
    put32(message, quoted + 12, source);
    put32(message, quoted + 16, destination);
    put16(message, quoted + 10, ~sum16(message, quoted, quoted + IPV4_SIZE));
    message.set(first.subarray(0, 8), quoted + IPV4_SIZE);
    putChecksum(message);
    this.#ip.send(message, GATEWAY, source, Protocol.ICMP);
  }
}

function putChecksum(message: Uint8Array): void {
  put16(message, OUT_TRANSPORT + 2, 0);
  put16(message, OUT_TRANSPORT + 2, ~sum16(message, OUT_TRANSPORT, message.length));
}
