import type { Duplex } from 'node:stream';
import { UsageError } from '../../errors.js';
import { GsoType, NET_HEADER_SIZE, NetHeader, NetHeaderFlag } from '../frame-stream-format.js';
import {
  BROADCAST,
  DNS_SERVER,
  GATEWAY,
  GUEST,
  inNetwork,
  isBroadcast,
  isGuestAddress,
  isRoutable,
} from './addresses.js';
import { Arp } from './arp.js';
import { u16 } from './bytes.js';
import { Counters } from './counters.js';
import { DHCP_SERVER_PORT, Dhcp } from './dhcp.js';
import { DNS_PORT, Dns } from './dns.js';
import { parseResolver } from './dns-upstream.js';
import { EtherType, In } from './ethernet.js';
import { type Allow, Policy } from './flow.js';
import { type HostForward, HostForwards } from './host-forward.js';
import { Icmp } from './icmp.js';
import { Fragment, Ipv4Output, Packet, Protocol, parseIpv4 } from './ipv4.js';
import { isForNetwork, Link } from './link.js';
import { Reassembly } from './reassembly.js';
import { Tcp } from './tcp.js';
import { DEFAULT_TUNING, type Tuning } from './tuning.js';
import { parseUdp, UdpOutput } from './udp.js';
import { UdpForwards } from './udp-forward.js';
import { UdpNat } from './udp-nat.js';

export type { Counters, DropReason } from './counters.js';
export type { Flow } from './flow.js';
export { type HostForward, parseHostForward } from './host-forward.js';

export interface UserNetworkOptions {
  readonly hostForwards?: readonly HostForward[];
  /**
   * Called for each new TCP connection, UDP flow and DNS question of the guest; false refuses it: a TCP connection is
   * reset, UDP is dropped, a question is answered REFUSED. Without it the guest may reach whatever this process can.
   */
  readonly allow?: Allow;
  /** Where the guest's DNS queries go, `ADDRESS` or `ADDRESS:PORT`, in order; the host's resolvers by default. */
  readonly resolvers?: readonly string[];
  /** What DHCP tells the guest to call itself. */
  readonly hostName?: string;
  /** Limits and times. */
  readonly tuning?: Partial<Tuning>;
}

/**
 * A network for one guest, made of the sockets that any process may open: 10.0.2.0/24 with the host (its loopback) and the
 * router at 10.0.2.2, a DNS server at 10.0.2.3 and the guest, by DHCP, at 10.0.2.15. Runs on the event loop that opened
 * it.
 */
export class UserNetwork implements AsyncDisposable {
  readonly #counters = new Counters();
  readonly #link: Link;
  readonly #arp: Arp;
  readonly #reassembly: Reassembly;
  readonly #icmp: Icmp;
  readonly #udp: UdpOutput;
  readonly #dhcp: Dhcp;
  readonly #dns: Dns;
  readonly #nat: UdpNat;
  readonly #udpForwards: UdpForwards;
  readonly #tcp: Tcp;
  readonly #forwards: HostForwards;
  readonly #packet = new Packet();
  /** The last bytes of the addresses that the guest has been seen to use. */
  readonly #guestAddresses = new Set([GUEST]);
  readonly #sweeper: NodeJS.Timeout;
  #hostForwards: readonly HostForward[] = [];
  #closed = false;

  /** With their real ports. */
  get hostForwards(): readonly HostForward[] {
    return this.#hostForwards;
  }

  get counters(): Readonly<Counters> {
    return this.#counters;
  }

  /**
   * Makes a network and binds its host forwards.
   * @throws UsageError for an option that is wrong, TsvisorError with ERR_NETWORK for a port that cannot be had; then
   * nothing stays bound.
   */
  static async open(options: UserNetworkOptions = {}): Promise<UserNetwork> {
    const network = new UserNetwork(options);
    try {
      network.#hostForwards = await network.#forwards.open(options.hostForwards ?? []);
    } catch (error) {
      await network.close();
      throw error;
    }
    return network;
  }

  private constructor(options: UserNetworkOptions) {
    const resolvers = options.resolvers?.map((text) => {
      const resolver = parseResolver(text);
      if (!resolver)
        throw new UsageError(`resolver '${text}' is not an IP address, or one with a port, as 127.0.0.1:53`);
      return resolver;
    });
    const hostName = options.hostName ?? '';
    if (!/^[A-Za-z0-9.-]{0,63}$/.test(hostName)) throw new UsageError(`host name '${hostName}' is not one`);
    const tuning: Tuning = { ...DEFAULT_TUNING, ...options.tuning };
    const counters = this.#counters;
    const policy = new Policy(options.allow, counters);
    const link = new Link(counters, {
      frame: (bytes) => this.#frame(bytes),
      drained: () => this.#tcp.drained(),
      lost: () => this.#guestGone(),
    });
    this.#link = link;
    this.#arp = new Arp(
      link,
      counters,
      (address) => this.#guestAddresses.has(address),
      (address) => this.#guestAddresses.add(address),
    );
    const ip = new Ipv4Output(link, (address) => this.#arp.ask(address));
    this.#reassembly = new Reassembly(counters, tuning);
    this.#icmp = new Icmp(ip, counters);
    this.#udp = new UdpOutput(link, ip);
    this.#dhcp = new Dhcp(counters, this.#udp, hostName);
    this.#dns = new Dns(counters, tuning, policy, this.#udp, resolvers);
    this.#nat = new UdpNat(counters, tuning, policy, this.#udp);
    this.#udpForwards = new UdpForwards(counters, tuning, this.#udp);
    const openDns = () => this.#dns.openStream();
    this.#tcp = new Tcp({ tuning, counters, link, ip, icmp: this.#icmp, policy, openDns });
    this.#forwards = new HostForwards(this.#tcp, this.#udpForwards, counters);
    this.#sweeper = setInterval(() => this.#sweep(), tuning.sweep);
    this.#sweeper.unref();
  }

  /**
   * Connects the device: a stream of messages as in frame-stream-format.ts. Chunks read from it must not change
   * afterwards. A device that was attached before is gone, and with it the guest's connections.
   */
  attach(stream: Duplex): void {
    if (this.#closed) {
      stream.destroy();
      return;
    }
    this.#link.attach(stream);
  }

  /** Ends everything: the guest's connections, the host forwards and the stream to the device. */
  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#sweeper);
    const stream = this.#link.detach();
    const gone = stream && !stream.closed ? new Promise((resolve) => stream.once('close', resolve)) : undefined;
    await Promise.all([
      gone,
      this.#forwards.close(),
      this.#udpForwards.close(),
      this.#tcp.close(),
      this.#nat.close(),
      this.#dns.close(),
    ]);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #guestGone(): void {
    this.#tcp.clear();
    this.#nat.clear();
    this.#reassembly.clear();
    this.#guestAddresses.clear();
    this.#guestAddresses.add(GUEST);
  }

  #sweep(): void {
    const now = performance.now();
    this.#reassembly.sweep(now);
    this.#nat.sweep(now);
    this.#udpForwards.sweep(now);
    this.#tcp.sweep(now);
  }

  // ---- Frames of the guest

  #frame(bytes: Uint8Array): void {
    const { dropped } = this.#counters;
    switch (u16(bytes, In.TYPE)) {
      case EtherType.ARP:
        this.#arp.input(bytes);
        return;
      case EtherType.IPV4:
        if (isForNetwork(bytes) || ((bytes[In.DESTINATION] as number) & 1) !== 0) this.#ipv4(bytes);
        else dropped.otherMac++;
        return;
      case EtherType.IPV6:
        dropped.ipv6++;
        return;
      default:
        dropped.unsupported++;
    }
  }

  #ipv4(bytes: Uint8Array): void {
    const packet = this.#packet;
    const { dropped } = this.#counters;
    const fragment = parseIpv4(packet, bytes, this.#counters);
    if (fragment < 0 || !this.#offloadsFit(packet, bytes) || !this.#endpointsFit(packet)) return;
    if (packet.source !== 0) {
      this.#link.learn(bytes);
      this.#guestAddresses.add(packet.source);
    }
    if (fragment & (Fragment.MORE | Fragment.OFFSET_MASK)) {
      if (packet.partial) dropped.malformed++;
      else if (this.#reassembly.add(packet, u16(bytes, In.PAYLOAD + 4), fragment)) this.#transport(packet);
      return;
    }
    this.#transport(packet);
  }

  /** Whether the virtio header says something that a driver may say of this packet. */
  #offloadsFit(packet: Packet, bytes: Uint8Array): boolean {
    const gso = (bytes[NetHeader.GSO_TYPE] as number) & ~GsoType.ECN;
    packet.partial = ((bytes[NetHeader.FLAGS] as number) & NetHeaderFlag.NEEDS_CSUM) !== 0;
    if (gso !== GsoType.NONE && (gso !== GsoType.TCPV4 || packet.protocol !== Protocol.TCP)) {
      this.#counters.dropped.unsupported++;
      return false;
    }
    if (!packet.partial) return true;
    const low = (at: number) => (bytes[at] as number) | ((bytes[at + 1] as number) << 8);
    const field = low(NetHeader.CSUM_START) + low(NetHeader.CSUM_OFFSET);
    if (field + 2 <= bytes.length - NET_HEADER_SIZE) return true;
    this.#counters.dropped.malformed++;
    return false;
  }

  /** Whether a packet comes from the guest and goes where a guest may send to. */
  #endpointsFit({ source, destination, protocol }: Packet): boolean {
    const { dropped } = this.#counters;
    const unnumbered = source === 0 && destination === BROADCAST && protocol === Protocol.UDP; // DHCP
    if (!unnumbered && !isGuestAddress(source)) dropped.spoofed++;
    else if (isBroadcast(destination) && (destination !== BROADCAST || protocol !== Protocol.UDP)) dropped.broadcast++;
    else if (!isBroadcast(destination) && !isRoutable(destination)) dropped.unreachable++;
    else return true;
    return false;
  }

  #transport(packet: Packet): void {
    switch (packet.protocol) {
      case Protocol.TCP:
        this.#tcp.input(packet);
        return;
      case Protocol.UDP:
        this.#udpInput(packet);
        return;
      case Protocol.ICMP:
        this.#icmp.input(packet);
        return;
      default:
        this.#counters.dropped.unsupported++;
    }
  }

  #udpInput(packet: Packet): void {
    const { dropped } = this.#counters;
    const datagram = parseUdp(packet, this.#counters);
    if (!datagram) return;
    const { destination, destinationPort } = datagram;
    if (destinationPort === DHCP_SERVER_PORT && (destination === BROADCAST || destination === GATEWAY)) {
      this.#dhcp.input(datagram);
    } else if (destination === BROADCAST) {
      dropped.broadcast++;
    } else if (destination === DNS_SERVER && destinationPort === DNS_PORT) {
      this.#dns.input(datagram);
    } else if (destination === GATEWAY ? !this.#udpForwards.input(datagram) : !inNetwork(destination)) {
      this.#nat.input(datagram);
    } else if (destination !== GATEWAY) {
      dropped.unreachable++;
    }
  }
}
