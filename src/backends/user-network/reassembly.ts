import type { Counters } from './counters.js';
import { Fragment, type Packet } from './ipv4.js';
import type { Tuning } from './tuning.js';

const MAXIMUM = 65535 - 20;
/** Fragments of one datagram: enough for 65535 bytes at the smallest MTU that Linux takes seriously (576). */
const MAX_FRAGMENTS = 128;

interface Assembly {
  readonly key: number;
  readonly id: number;
  readonly started: number;
  /** Grows with the fragments that come. */
  bytes: Uint8Array;
  received: number;
  /** -1 until the last fragment came. */
  total: number;
  /** What came: starts and ends. */
  readonly ranges: [number, number][];
}

/** Puts IPv4 fragments of the guest together (RFC 791). Overlaps are an attack or a defect: the datagram is dropped. */
export class Reassembly {
  readonly #counters: Counters;
  readonly #tuning: Tuning;
  /** Oldest first; few, so that a search is short. */
  #assemblies: Assembly[] = [];

  constructor(counters: Counters, tuning: Tuning) {
    this.#counters = counters;
    this.#tuning = tuning;
  }

  /** @returns whether the packet is now a whole datagram, in place of the fragment. */
  add(packet: Packet, id: number, fragment: number): boolean {
    const offset = (fragment & Fragment.OFFSET_MASK) * 8;
    const length = packet.end - packet.start;
    const more = (fragment & Fragment.MORE) !== 0;
    const assembly = this.#find(packet, id);
    const end = offset + length;
    const bad =
      length === 0 ||
      (more && length % 8 !== 0) ||
      end > MAXIMUM ||
      (assembly.total >= 0 && (end > assembly.total || !more)) ||
      (!more && assembly.ranges.some((range) => range[1] > end)) ||
      assembly.ranges.length >= MAX_FRAGMENTS ||
      assembly.ranges.some((range) => offset < range[1] && end > range[0]);
    if (bad) {
      this.#drop(assembly);
      return false;
    }
    if (!more) assembly.total = end;
    this.#reserve(assembly, end);
    assembly.bytes.set(packet.bytes.subarray(packet.start, packet.end), offset);
    assembly.received += length;
    assembly.ranges.push([offset, end]);
    if (assembly.received !== assembly.total) return false;
    this.#remove(assembly);
    packet.bytes = assembly.bytes;
    packet.start = 0;
    packet.end = assembly.total;
    packet.partial = false;
    return true;
  }

  #find(packet: Packet, id: number): Assembly {
    // Source (its last byte), protocol and destination: below 2^48.
    const key = ((packet.source & 255) * 256 + packet.protocol) * 0x1_0000_0000 + packet.destination;
    const found = this.#assemblies.find((assembly) => assembly.id === id && assembly.key === key);
    if (found) return found;
    if (this.#assemblies.length >= this.#tuning.reassemblies) this.#drop(this.#assemblies[0] as Assembly);
    const bytes = new Uint8Array(0);
    const assembly = { key, id, started: performance.now(), bytes, received: 0, total: -1, ranges: [] };
    this.#assemblies.push(assembly);
    return assembly;
  }

  #reserve(assembly: Assembly, end: number): void {
    if (assembly.bytes.length >= end) return;
    const size = assembly.total >= 0 ? assembly.total : Math.min(MAXIMUM, Math.max(end, 2 * assembly.bytes.length));
    const bytes = new Uint8Array(size);
    bytes.set(assembly.bytes);
    assembly.bytes = bytes;
  }

  #remove(assembly: Assembly): void {
    this.#assemblies = this.#assemblies.filter((other) => other !== assembly);
  }

  #drop(assembly: Assembly): void {
    this.#counters.dropped.fragment++;
    this.#remove(assembly);
  }

  /** Drops what waited too long. */
  sweep(now: number): void {
    for (const assembly of this.#assemblies) {
      if (now - assembly.started > this.#tuning.reassemblyTimeout) this.#drop(assembly);
    }
  }

  clear(): void {
    this.#assemblies = [];
  }
}
