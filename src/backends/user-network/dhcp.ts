import { BROADCAST, DNS_SERVER, GATEWAY, GUEST, MTU, NETMASK, NETWORK_BROADCAST } from './addresses.js';
import { put32, u32 } from './bytes.js';
import type { Counters } from './counters.js';
import type { Datagram, UdpOutput } from './udp.js';

export const DHCP_SERVER_PORT = 67;
const CLIENT_PORT = 68;
/** Seconds. */
const LEASE = 86_400;

/** Offsets in a message (RFC 2131 section 2). */
const At = { OP: 0, HTYPE: 1, HLEN: 2, XID: 4, FLAGS: 10, CIADDR: 12, YIADDR: 16, SIADDR: 20, CHADDR: 28 } as const;
const COOKIE = 236;
const OPTIONS = 240;
const MAGIC = 0x63825363;
const BOOTREQUEST = 1;
const BOOTREPLY = 2;
/** Replies are padded to what every BOOTP client takes. */
const MINIMUM_REPLY = 300;

const Option = {
  PAD: 0,
  SUBNET_MASK: 1,
  ROUTER: 3,
  DNS: 6,
  HOST_NAME: 12,
  INTERFACE_MTU: 26,
  BROADCAST_ADDRESS: 28,
  REQUESTED_ADDRESS: 50,
  LEASE_TIME: 51,
  MESSAGE_TYPE: 53,
  SERVER: 54,
  END: 255,
} as const;

const Type = { DISCOVER: 1, OFFER: 2, REQUEST: 3, DECLINE: 4, ACK: 5, NAK: 6, RELEASE: 7, INFORM: 8 } as const;

interface Request {
  readonly type: number;
  readonly requested: number;
  readonly server: number;
}

/** A DHCP server (RFC 2131) with one address to give. */
export class Dhcp {
  readonly #counters: Counters;
  readonly #output: UdpOutput;
  readonly #hostName: Buffer;

  /** @param hostName what the guest should call itself; empty: nothing. At most 255 bytes. */
  constructor(counters: Counters, output: UdpOutput, hostName: string) {
    this.#counters = counters;
    this.#output = output;
    this.#hostName = Buffer.from(hostName);
  }

  input({ payload }: Datagram): void {
    const request = parse(payload);
    if (!request) {
      this.#counters.dropped.malformed++;
      return;
    }
    const client = u32(payload, At.CIADDR);
    switch (request.type) {
      case Type.DISCOVER:
        this.#reply(payload, Type.OFFER);
        return;
      case Type.REQUEST: {
        if (request.server !== 0 && request.server !== GATEWAY) return; // another server's offer was chosen
        const wanted = request.requested || client;
        this.#reply(payload, wanted === GUEST ? Type.ACK : Type.NAK);
        return;
      }
      case Type.INFORM:
        this.#reply(payload, Type.ACK, true);
        return;
      case Type.RELEASE:
      case Type.DECLINE:
        return; // there is one address and one guest
      default:
        this.#counters.dropped.unsupported++;
    }
  }

  #reply(request: Uint8Array, type: number, inform = false): void {
    const reply = Buffer.alloc(OPTIONS + 64 + this.#hostName.length);
    reply.set(request.subarray(0, OPTIONS)); // xid, flags, relay, client's MAC
    reply.fill(0, At.CHADDR + 16, COOKIE);
    reply[At.OP] = BOOTREPLY;
    reply[3] = 0; // hops
    reply[8] = reply[9] = 0; // seconds
    const client = u32(request, At.CIADDR);
    const leases = type !== Type.NAK && !inform;
    put32(reply, At.YIADDR, leases ? GUEST : 0);
    put32(reply, At.CIADDR, type === Type.ACK ? client : 0);
    put32(reply, At.SIADDR, type === Type.NAK ? 0 : GATEWAY);
    const options = new Options(reply);
    options.add(Option.MESSAGE_TYPE, [type]);
    options.addAddress(Option.SERVER, GATEWAY);
    if (type !== Type.NAK) {
      if (leases) options.addAddress(Option.LEASE_TIME, LEASE);
      options.addAddress(Option.SUBNET_MASK, NETMASK);
      options.addAddress(Option.ROUTER, GATEWAY);
      options.addAddress(Option.DNS, DNS_SERVER);
      options.addAddress(Option.BROADCAST_ADDRESS, NETWORK_BROADCAST);
      options.add(Option.INTERFACE_MTU, [MTU >>> 8, MTU & 255]);
      if (this.#hostName.length > 0) options.add(Option.HOST_NAME, this.#hostName);
    }
    const length = Math.max(MINIMUM_REPLY, options.end());
    // Who has an address already may listen on it alone; all others take the broadcast address, whatever they asked for.
    const destination = client === GUEST && type === Type.ACK ? GUEST : BROADCAST;
    this.#output.send(GATEWAY, DHCP_SERVER_PORT, destination, CLIENT_PORT, reply.subarray(0, length));
  }
}

class Options {
  readonly #message: Buffer;
  #at = OPTIONS;

  constructor(message: Buffer) {
    this.#message = message;
  }

  add(code: number, value: ArrayLike<number>): void {
    this.#message[this.#at] = code;
    this.#message[this.#at + 1] = value.length;
    this.#message.set(value, this.#at + 2);
    this.#at += 2 + value.length;
  }

  addAddress(code: number, value: number): void {
    const bytes = new Uint8Array(4);
    put32(bytes, 0, value);
    this.add(code, bytes);
  }

  /** @returns the length of the message. */
  end(): number {
    this.#message[this.#at++] = Option.END;
    return this.#at;
  }
}

/** @returns undefined when it is not a DHCP request from Ethernet. */
function parse(message: Uint8Array): Request | undefined {
  if (message.length < OPTIONS || u32(message, COOKIE) !== MAGIC) return undefined;
  if (message[At.OP] !== BOOTREQUEST || message[At.HTYPE] !== 1 || message[At.HLEN] !== 6) return undefined;
  let type = 0;
  let requested = 0;
  let server = 0;
  for (let at = OPTIONS; at < message.length && message[at] !== Option.END; ) {
    const code = message[at++];
    if (code === Option.PAD) continue;
    const length = message[at++];
    if (length === undefined || at + length > message.length) return undefined;
    if (code === Option.MESSAGE_TYPE && length === 1) type = message[at] as number;
    else if (code === Option.REQUESTED_ADDRESS && length === 4) requested = u32(message, at);
    else if (code === Option.SERVER && length === 4) server = u32(message, at);
    at += length;
  }
  return type === 0 ? undefined : { type, requested, server };
}
