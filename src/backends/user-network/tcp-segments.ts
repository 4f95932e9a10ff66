import type { ByteQueue } from '../byte-queue.js';
import { GsoType, GuestOffload, NetHeader } from '../frame-stream-format.js';
import { MTU } from './addresses.js';
import { put16, put32, u16, u32 } from './bytes.js';
import { fold, pseudoHeaderSum, sum16 } from './checksum.js';
import type { Counters } from './counters.js';
import { newFrame, Out } from './ethernet.js';
import { IPV4_SIZE, type Ipv4Output, needsChecksum, OUT_TRANSPORT, type Packet, Protocol } from './ipv4.js';
import { type Link, noOffload } from './link.js';

const TCP_SIZE = 20;
const CHECKSUM = 16;
/** Below this much data one copy is cheaper than a write of several pieces. */
const COPY_BELOW = 2048;

/** The maximum segment size of the link, in both directions. */
export const LINK_MSS = MTU - IPV4_SIZE - TCP_SIZE;
/** What IPv4 lets every host take (RFC 9293 section 3.7.1): a smaller MSS of a guest is not believed. */
const MINIMUM_MSS = 536;

export const Flag = { FIN: 1, SYN: 2, RST: 4, PSH: 8, ACK: 16 } as const;
const Option = { END: 0, NOP: 1, MSS: 2, WINDOW_SCALE: 3 } as const;
const MAX_WINDOW_SCALE = 14;

/** Sequence numbers count modulo 2^32: positive when `a` is after `b`. */
export function sequenceDifference(a: number, b: number): number {
  return (a - b) | 0;
}

/** A segment from the guest. There is one object, used again for each. */
export class Segment {
  source = 0;
  sourcePort = 0;
  destination = 0;
  destinationPort = 0;
  sequence = 0;
  acknowledgement = 0;
  flags = 0;
  /** As in the header: not scaled. */
  window = 0;
  /** Of a SYN: the largest segment to send, in bytes. */
  mss = 0;
  /** Of a SYN: -1 when there is no such option. */
  windowScale = -1;
  bytes: Uint8Array = new Uint8Array(0);
  /** The payload is bytes [start, end). */
  start = 0;
  end = 0;

  has(flag: number): boolean {
    return (this.flags & flag) !== 0;
  }
}

const segment = new Segment();

/** @returns undefined when the packet was dropped and counted. The result is valid until the next call. */
export function parseTcp(packet: Packet, counters: Counters): Segment | undefined {
  const { bytes, start, end } = packet;
  const header = end - start < TCP_SIZE ? 0 : ((bytes[start + 12] as number) >>> 4) * 4;
  if (header < TCP_SIZE || start + header > end || u16(bytes, start) === 0 || u16(bytes, start + 2) === 0) {
    counters.dropped.malformed++;
    return undefined;
  }
  if (!packet.partial && !packet.transportSumIsValid()) {
    counters.dropped.checksum++;
    return undefined;
  }
  segment.source = packet.source;
  segment.destination = packet.destination;
  segment.sourcePort = u16(bytes, start);
  segment.destinationPort = u16(bytes, start + 2);
  segment.sequence = u32(bytes, start + 4);
  segment.acknowledgement = u32(bytes, start + 8);
  segment.flags = bytes[start + 13] as number;
  segment.window = u16(bytes, start + 14);
  segment.bytes = bytes;
  segment.start = start + header;
  segment.end = end;
  if (segment.has(Flag.SYN)) parseOptions(bytes, start + TCP_SIZE, start + header);
  return segment;
}

/** Options that make no sense end the list: nothing after them can be trusted. */
function parseOptions(bytes: Uint8Array, start: number, end: number): void {
  segment.mss = MINIMUM_MSS;
  segment.windowScale = -1;
  for (let at = start; at < end && bytes[at] !== Option.END; ) {
    if (bytes[at] === Option.NOP) {
      at++;
      continue;
    }
    const length = at + 1 < end ? (bytes[at + 1] as number) : 0;
    if (length < 2 || at + length > end) return;
    if (bytes[at] === Option.MSS && length === 4) {
      segment.mss = Math.min(LINK_MSS, Math.max(MINIMUM_MSS, u16(bytes, at + 2)));
    } else if (bytes[at] === Option.WINDOW_SCALE && length === 3) {
      segment.windowScale = Math.min(MAX_WINDOW_SCALE, bytes[at + 2] as number);
    }
    at += length;
  }
}

/** The addresses and ports of a connection, as the guest sees it. */
export interface Endpoints {
  readonly guestAddress: number;
  readonly guestPort: number;
  readonly remoteAddress: number;
  readonly remotePort: number;
}

/** Builds segments for the guest, as large and with as little checksum as it accepts. */
export class TcpOutput {
  readonly #link: Link;
  readonly #ip: Ipv4Output;

  constructor(link: Link, ip: Ipv4Output) {
    this.#link = link;
    this.#ip = ip;
  }

  /** The most data that one segment may carry, in bytes. */
  maximumSegment(mss: number): number {
    if ((this.#link.offloads & GuestOffload.TSO4) === 0 || !this.#partialChecksums) return mss;
    return Math.floor((65535 - IPV4_SIZE - TCP_SIZE) / mss) * mss;
  }

  get #partialChecksums(): boolean {
    return (this.#link.offloads & GuestOffload.CHECKSUM) !== 0;
  }

  /** A segment without data. */
  send(to: Endpoints, flags: number, sequence: number, acknowledgement: number, window: number): void {
    this.#finish(newFrame(IPV4_SIZE + TCP_SIZE), to, flags, sequence, acknowledgement, window, TCP_SIZE);
  }

  /** A SYN, or SYN and ACK. @param windowScale -1: without that option. */
  sendSyn(
    to: Endpoints,
    flags: number,
    sequence: number,
    acknowledgement: number,
    window: number,
    windowScale: number,
  ) {
    const header = TCP_SIZE + (windowScale < 0 ? 4 : 8);
    const frame = newFrame(IPV4_SIZE + header);
    const at = OUT_TRANSPORT + TCP_SIZE;
    frame[at] = Option.MSS;
    frame[at + 1] = 4;
    put16(frame, at + 2, LINK_MSS);
    if (windowScale >= 0) {
      frame[at + 4] = Option.NOP;
      frame[at + 5] = Option.WINDOW_SCALE;
      frame[at + 6] = 3;
      frame[at + 7] = windowScale;
    }
    this.#finish(frame, to, flags, sequence, acknowledgement, window, header);
  }

  /** A segment with `length` bytes of the queue from `offset` on; not more than maximumSegment(mss). */
  sendData(
    to: Endpoints,
    flags: number,
    sequence: number,
    acknowledgement: number,
    window: number,
    queue: ByteQueue,
    offset: number,
    length: number,
    mss: number,
  ): void {
    if (length < COPY_BELOW || !this.#partialChecksums) {
      const frame = newFrame(IPV4_SIZE + TCP_SIZE + length);
      queue.copyTo(frame, OUT_TRANSPORT + TCP_SIZE, offset, length);
      this.#finish(frame, to, flags, sequence, acknowledgement, window, TCP_SIZE, length > mss ? mss : 0);
    } else {
      const parts: Uint8Array[] = [];
      queue.read(offset, length, (part) => parts.push(part));
      const head = newFrame(IPV4_SIZE + TCP_SIZE);
      this.#finish(head, to, flags, sequence, acknowledgement, window, TCP_SIZE, length > mss ? mss : 0, parts, length);
    }
  }

  #finish(
    head: Buffer,
    to: Endpoints,
    flags: number,
    sequence: number,
    acknowledgement: number,
    window: number,
    header: number,
    gsoSize = 0,
    parts?: readonly Uint8Array[],
    partsLength = 0,
  ): void {
    const at = OUT_TRANSPORT;
    put16(head, at, to.remotePort);
    put16(head, at + 2, to.guestPort);
    put32(head, at + 4, sequence);
    put32(head, at + 8, acknowledgement);
    head[at + 12] = (header / 4) << 4;
    head[at + 13] = flags;
    put16(head, at + 14, window);
    put32(head, at + CHECKSUM, 0); // and the urgent pointer
    const length = head.length - at + partsLength;
    const pseudo = pseudoHeaderSum(to.remoteAddress, to.guestAddress, Protocol.TCP, length);
    if (this.#partialChecksums) {
      needsChecksum(head, CHECKSUM);
      put16(head, at + CHECKSUM, pseudo);
      if (gsoSize > 0) largeSegment(head, header, gsoSize);
    } else {
      noOffload(head); // then there are no parts: all is in `head`
      put16(head, at + CHECKSUM, ~fold(pseudo + sum16(head, at, head.length)));
    }
    this.#ip.send(head, to.remoteAddress, to.guestAddress, Protocol.TCP, parts, partsLength);
  }
}

function largeSegment(head: Uint8Array, header: number, gsoSize: number): void {
  const at = Out.NET_HEADER;
  head[at + NetHeader.GSO_TYPE] = GsoType.TCPV4;
  head[at + NetHeader.HDR_LEN] = OUT_TRANSPORT - Out.ETHERNET + header;
  head[at + NetHeader.GSO_SIZE] = gsoSize & 255;
  head[at + NetHeader.GSO_SIZE + 1] = gsoSize >>> 8;
}
