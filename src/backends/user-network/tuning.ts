/** Limits and times of the network; the defaults are for programs, smaller ones for tests. Bytes and milliseconds. */
export interface Tuning {
  /** TCP connections at once, both directions, those that are not yet open included: each is a file descriptor. */
  readonly connections: number;
  /** Of those, the ones whose handshake is not complete. */
  readonly halfOpen: number;
  /** Bytes from the guest that a host socket has not taken: the largest window a connection advertises. */
  readonly receiveBuffer: number;
  /** Bytes for the guest, unsent or unacknowledged, at which a host socket is no longer read. */
  readonly sendBuffer: number;
  /**
   * Bytes that all connections hold together before they stop taking more. A host socket that is stopped may have read
   * two chunks of 64 KiB beyond it.
   */
  readonly totalBuffer: number;
  /** How long an acknowledgement of little data waits for company. */
  readonly delayedAck: number;
  /** Bounds of the retransmission timeout (RFC 6298); it starts at `firstTimeout`. */
  readonly minimumTimeout: number;
  readonly firstTimeout: number;
  readonly maximumTimeout: number;
  /** Timeouts in a row before a connection is given up, once it is open. */
  readonly retries: number;
  readonly timeWait: number;
  /** How long a host socket may take to send what a finished connection left. */
  readonly linger: number;
  /** A connection without a segment for so long is probed: the guest may have been restarted. */
  readonly keepAlive: number;
  /** Guest source ports with a UDP socket, and the peers each remembers. */
  readonly udpMappings: number;
  readonly udpFlows: number;
  readonly udpIdle: number;
  /** Bytes of UDP that wait for a socket or for `allow`. */
  readonly udpPending: number;
  /** Peers of all UDP host forwards. */
  readonly forwardPeers: number;
  readonly dnsQueries: number;
  /** How long one resolver may take. */
  readonly dnsTimeout: number;
  /** IPv4 datagrams being put together. */
  readonly reassemblies: number;
  readonly reassemblyTimeout: number;
  /** How often idle things are looked for. */
  readonly sweep: number;
}

export const DEFAULT_TUNING: Tuning = {
  connections: 2048,
  halfOpen: 512,
  receiveBuffer: 256 * 1024,
  sendBuffer: 512 * 1024,
  totalBuffer: 64 * 1024 * 1024,
  delayedAck: 10,
  minimumTimeout: 1000,
  firstTimeout: 1000,
  maximumTimeout: 60_000,
  retries: 12,
  timeWait: 1000,
  linger: 60_000,
  keepAlive: 15 * 60_000,
  udpMappings: 512,
  udpFlows: 128,
  udpIdle: 90_000,
  udpPending: 1024 * 1024,
  forwardPeers: 1024,
  dnsQueries: 64,
  dnsTimeout: 2500,
  reassemblies: 16,
  reassemblyTimeout: 15_000,
  sweep: 5000,
};
