/** Why a frame of the guest, or one for it, was dropped. */
export type DropReason =
  | 'malformed' // runts, lengths and headers that cannot be right
  | 'checksum'
  | 'ipv6'
  | 'unsupported' // other ethertypes, VLANs, protocols, ICMP types, offloads
  | 'otherMac' // not for the network's MAC
  | 'broadcast' // broadcast and multicast that is not ARP or DHCP
  | 'spoofed' // a source address that is not the guest's
  | 'unreachable' // a destination that no guest may send to, or an address of the network where nobody is
  | 'fragment' // fragments that overlap, are too many, or waited too long for the rest
  | 'limit' // too many connections, flows, queries or bytes
  | 'linkFull' // the device does not read
  | 'noGuest'; // the guest's MAC is not known yet, or no device is attached

/** What happened since the network was opened. Plain numbers that only grow, but for those that say "now". */
export class Counters {
  framesFromGuest = 0;
  bytesFromGuest = 0;
  framesToGuest = 0;
  bytesToGuest = 0;
  /** Streams that ended because a message length could not be right. */
  brokenLinks = 0;
  readonly dropped: Record<DropReason, number> = {
    malformed: 0,
    checksum: 0,
    ipv6: 0,
    unsupported: 0,
    otherMac: 0,
    broadcast: 0,
    spoofed: 0,
    unreachable: 0,
    fragment: 0,
    limit: 0,
    linkFull: 0,
    noGuest: 0,
  };
  /** TCP connections that became open, from the guest and from host forwards. */
  tcpOpened = 0;
  /** TCP connections of the guest that the host could not make. */
  tcpFailed = 0;
  tcpNow = 0;
  tcpRetransmissions = 0;
  /** Bytes that all TCP connections hold now, in both directions. */
  tcpBufferedNow = 0;
  udpMappingsNow = 0;
  udpToHost = 0;
  udpToGuest = 0;
  dnsQueries = 0;
  dnsFailed = 0;
  /** Connections, flows and questions that `allow` refused. */
  refused = 0;
  /** Errors of host sockets that have no other place to be seen. */
  hostErrors = 0;
}
