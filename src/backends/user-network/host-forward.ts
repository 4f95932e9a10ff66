import { type AddressInfo, createServer, type Server } from 'node:net';
import { NetworkError, UsageError } from '../../errors.js';
import { GUEST, isGuestAddress, parseAddress } from './addresses.js';
import type { Counters } from './counters.js';
import type { Tcp } from './tcp.js';
import type { UdpForwards } from './udp-forward.js';

/** A port of the host behind which a port of the guest is reached. */
export interface HostForward {
  readonly protocol: 'tcp' | 'udp';
  /** An IPv4 address of the host; `0.0.0.0` for all. */
  readonly hostAddress: string;
  /** 0 picks a free one. */
  readonly hostPort: number;
  /** An address of 10.0.2.0/24; 10.0.2.15, which the guest gets by DHCP, by default. */
  readonly guestAddress?: string;
  readonly guestPort: number;
}

/**
 * A forward in QEMU's syntax: `tcp:127.0.0.1:8080-:80`, `udp::5353-10.0.2.15:53`. An empty host address is 127.0.0.1, not
 * all addresses as in QEMU: what the guest offers is not shown to the network unless asked for with 0.0.0.0.
 * @throws UsageError
 */
export function parseHostForward(text: string): HostForward {
  const match = /^(tcp|udp):([^:-]*):([^:-]+)-([^:-]*):([^:-]+)$/.exec(text);
  if (!match) {
    throw new UsageError(`host forward '${text}' is not tcp|udp:[ADDRESS]:PORT-[GUESTADDRESS]:PORT, as tcp::8080-:80`);
  }
  const [, protocol, hostAddress, hostPort, guestAddress, guestPort] = match as unknown as string[];
  const forward: HostForward = {
    protocol: protocol as 'tcp' | 'udp',
    hostAddress: hostAddress || '127.0.0.1',
    hostPort: parsePort(text, hostPort as string),
    ...(guestAddress ? { guestAddress } : {}),
    guestPort: parsePort(text, guestPort as string),
  };
  checkHostForward(forward, `host forward '${text}'`);
  return forward;
}

function parsePort(text: string, port: string): number {
  if (!/^\d{1,5}$/.test(port)) throw new UsageError(`host forward '${text}': '${port}' is not a port number`);
  return Number(port);
}

/** The forward as parseHostForward takes it. */
export function formatHostForward(forward: HostForward): string {
  const { protocol, hostAddress, hostPort, guestAddress, guestPort } = forward;
  return `${protocol}:${hostAddress}:${hostPort}-${guestAddress ?? ''}:${guestPort}`;
}

/** @param where the message says it is. @throws UsageError when a field is wrong. */
export function checkHostForward(forward: HostForward, where = `host forward '${formatHostForward(forward)}'`): void {
  const problem = (what: string) => new UsageError(`${where}: ${what}`);
  const { protocol, hostAddress, hostPort, guestAddress, guestPort } = forward;
  if (protocol !== 'tcp' && protocol !== 'udp') throw problem(`protocol '${protocol}' is not tcp or udp`);
  if (parseAddress(hostAddress) < 0) throw problem(`host address '${hostAddress}' is not an IPv4 address`);
  if (!Number.isInteger(hostPort) || hostPort < 0 || hostPort > 65535) {
    throw problem(`host port ${hostPort} is not between 0 and 65535`);
  }
  if (guestAddress !== undefined && !isGuestAddress(parseAddress(guestAddress))) {
    throw problem(`guest address '${guestAddress}' is not one of a guest in 10.0.2.0/24; leave it out for 10.0.2.15`);
  }
  if (!Number.isInteger(guestPort) || guestPort < 1 || guestPort > 65535) {
    throw problem(`guest port ${guestPort} is not between 1 and 65535`);
  }
}

/** Listens on ports of the host for the guest. */
export class HostForwards {
  readonly #tcp: Tcp;
  readonly #udp: UdpForwards;
  readonly #counters: Counters;
  readonly #servers: Server[] = [];

  constructor(tcp: Tcp, udp: UdpForwards, counters: Counters) {
    this.#tcp = tcp;
    this.#udp = udp;
    this.#counters = counters;
  }

  /**
   * Binds all, or none.
   * @returns them with their real ports.
   * @throws UsageError, or TsvisorError with ERR_NETWORK
   */
  async open(forwards: readonly HostForward[]): Promise<HostForward[]> {
    for (const forward of forwards) checkHostForward(forward);
    const opened: HostForward[] = [];
    try {
      for (const forward of forwards) opened.push({ ...forward, hostPort: await this.#bind(forward) });
    } catch (error) {
      await Promise.all([this.close(), this.#udp.close()]);
      throw error;
    }
    return opened;
  }

  async #bind(forward: HostForward): Promise<number> {
    const { protocol, hostAddress, hostPort, guestAddress, guestPort } = forward;
    const guest = guestAddress === undefined ? GUEST : parseAddress(guestAddress);
    try {
      if (protocol === 'udp') return await this.#udp.bind(hostAddress, hostPort, guest, guestPort);
      return await this.#listen(hostAddress, hostPort, guest, guestPort);
    } catch (error) {
      throw bindError(forward, error as NodeJS.ErrnoException);
    }
  }

  #listen(host: string, port: number, guest: number, guestPort: number): Promise<number> {
    const server = createServer({ allowHalfOpen: true, noDelay: true, pauseOnConnect: true });
    server.on('connection', (socket) => this.#tcp.open(socket, guest, guestPort));
    return new Promise((resolve, reject) => {
      server.once('error', reject);
      server.listen({ host, port, exclusive: true }, () => {
        server.off('error', reject);
        server.on('error', () => void this.#counters.hostErrors++);
        this.#servers.push(server);
        resolve((server.address() as AddressInfo).port);
      });
    });
  }

  /** Listens no more. The connections are the business of Tcp. */
  async close(): Promise<void> {
    await Promise.all(this.#servers.map((server) => new Promise((resolve) => server.close(resolve))));
    this.#servers.length = 0;
  }
}

function bindError(forward: HostForward, error: NodeJS.ErrnoException): NetworkError {
  const { hostAddress, hostPort } = forward;
  const reasons: Record<string, string> = {
    EADDRINUSE: `port ${hostPort} of ${hostAddress} is in use; choose another, or 0 for any`,
    EACCES: `this user may not listen on port ${hostPort}; choose one above 1023`,
    EPERM: `this user may not listen on port ${hostPort}; choose one above 1023`,
    EADDRNOTAVAIL: `${hostAddress} is not an address of this host`,
  };
  const reason = reasons[error.code ?? ''] ?? `cannot listen: ${error.message}`;
  return new NetworkError(`host forward '${formatHostForward(forward)}': ${reason}`, { cause: error });
}
