import { DNS_SERVER, GATEWAY, inNetwork, isGuestAddress, NETWORK_MAC } from './addresses.js';
import { put16, put32, u16, u32 } from './bytes.js';
import type { Counters } from './counters.js';
import { EtherType, In, newFrame, Out } from './ethernet.js';
import { type Link, noOffload } from './link.js';

const SIZE = 28;
const REQUEST = 1;
const REPLY = 2;
/** Hardware type Ethernet, protocol IPv4, address lengths 6 and 4. */
const ETHERNET_IPV4 = [0x0001, 0x0800, 0x0604] as const;
/** Offsets in an ARP packet (RFC 826). */
const OPERATION = 6;
const SENDER_MAC = 8;
const SENDER_ADDRESS = 14;
const TARGET_MAC = 18;
const TARGET_ADDRESS = 24;
/** Milliseconds between questions for the guest's MAC. */
const ASK_INTERVAL = 1000;

/** Answers for every address of the network but those that the guest uses. */
export class Arp {
  readonly #link: Link;
  readonly #counters: Counters;
  readonly #isGuests: (address: number) => boolean;
  readonly #use: (address: number) => void;
  #asked = Number.NEGATIVE_INFINITY;

  /**
   * @param isGuests whether the guest uses an address of the network.
   * @param use notes that it does.
   */
  constructor(link: Link, counters: Counters, isGuests: (address: number) => boolean, use: (address: number) => void) {
    this.#link = link;
    this.#counters = counters;
    this.#isGuests = isGuests;
    this.#use = use;
  }

  input(bytes: Uint8Array): void {
    const at = In.PAYLOAD;
    if (bytes.length < at + SIZE || ETHERNET_IPV4.some((value, i) => u16(bytes, at + 2 * i) !== value)) {
      this.#counters.dropped.malformed++;
      return;
    }
    const operation = u16(bytes, at + OPERATION);
    const sender = u32(bytes, at + SENDER_ADDRESS);
    const target = u32(bytes, at + TARGET_ADDRESS);
    if (sender !== 0 && !isGuestAddress(sender)) {
      this.#counters.dropped.spoofed++;
      return;
    }
    if (operation !== REQUEST && operation !== REPLY) {
      this.#counters.dropped.unsupported++;
      return;
    }
    if (sender !== 0) {
      this.#link.learn(bytes);
      this.#use(sender);
    }
    if (operation === REQUEST && this.#answers(sender, target)) this.#reply(bytes, sender, target);
  }

  #answers(sender: number, target: number): boolean {
    // A probe (RFC 5227) asks whether the guest may use an address: only the network's own are taken.
    if (target === GATEWAY || target === DNS_SERVER) return true;
    return sender !== 0 && sender !== target && inNetwork(target) && isGuestAddress(target) && !this.#isGuests(target);
  }

  #reply(request: Uint8Array, sender: number, target: number): void {
    this.#link.learn(request);
    const reply = packet(REPLY, target, sender);
    reply.set(request.subarray(In.PAYLOAD + SENDER_MAC, In.PAYLOAD + SENDER_MAC + 6), Out.PAYLOAD + TARGET_MAC);
    this.#link.send(reply, EtherType.ARP);
  }

  /** Asks who has `address`; not too often. */
  ask(address: number): void {
    const now = performance.now();
    if (now - this.#asked < ASK_INTERVAL) return;
    this.#asked = now;
    this.#link.broadcast(packet(REQUEST, GATEWAY, address), EtherType.ARP);
  }
}

function packet(operation: number, sender: number, target: number): Buffer {
  const frame = newFrame(SIZE).fill(0);
  noOffload(frame);
  for (let i = 0; i < 3; i++) put16(frame, Out.PAYLOAD + 2 * i, ETHERNET_IPV4[i] as number);
  put16(frame, Out.PAYLOAD + OPERATION, operation);
  frame.set(NETWORK_MAC, Out.PAYLOAD + SENDER_MAC);
  put32(frame, Out.PAYLOAD + SENDER_ADDRESS, sender);
  put32(frame, Out.PAYLOAD + TARGET_ADDRESS, target);
  return frame;
}
