/** A port of the host that leads to a port of the guest. */
export interface HostForward {
  readonly protocol: 'tcp' | 'udp';
  readonly hostAddress: string;
  /** 0 picks a free one. */
  readonly hostPort: number;
  /** Default: the address that the guest got by DHCP. */
  readonly guestAddress?: string;
  readonly guestPort: number;
}

/** Where a guest wants to go: a new TCP connection, UDP flow or DNS question. */
export interface Flow {
  readonly protocol: 'tcp' | 'udp' | 'dns';
  readonly address: string;
  readonly port: number;
  /** The name that a DNS question asks for. */
  readonly name?: string;
}
