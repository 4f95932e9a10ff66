import dns, { lookup, lookupService } from 'node:dns';
import { Duplex } from 'node:stream';
import { promisify } from 'node:util';
import { DNS_SERVER, formatAddress, parseAddress } from './addresses.js';
import { put16, put32, u16 } from './bytes.js';
import type { Counters } from './counters.js';
import { encodeName, isQuery, parseQuestion, type Question, RecordType, ResponseCode, respond } from './dns-message.js';
import { parseResolver, type Resolver, Upstream } from './dns-upstream.js';
import type { Policy } from './flow.js';
import type { Tuning } from './tuning.js';
import type { Datagram, UdpOutput } from './udp.js';

export const DNS_PORT = 53;
/** Names that the system's resolver looks up at once: each occupies a thread of Node's pool, which the program needs. */
const MAX_LOOKUPS = 2;
/** Seconds that an answer of the system's resolver holds. */
const LOOKUP_TTL = 30;
/** A query over TCP that is longer is not one. */
const MAX_QUERY = 4096;

const lookupAddresses = promisify(lookup);
const lookupName = promisify(lookupService);

/** The DNS server of the guest: passes its queries to the host's resolvers as they are. */
export class Dns {
  readonly #counters: Counters;
  readonly #tuning: Tuning;
  readonly #policy: Policy;
  readonly #output: UdpOutput;
  /** undefined: the host's, as they are at the time of a query. */
  readonly #resolvers: readonly Resolver[] | undefined;
  readonly #upstream: Upstream;
  #active = 0;
  #lookups = 0;
  #closed = false;

  constructor(
    counters: Counters,
    tuning: Tuning,
    policy: Policy,
    output: UdpOutput,
    resolvers: readonly Resolver[] | undefined,
  ) {
    this.#counters = counters;
    this.#tuning = tuning;
    this.#policy = policy;
    this.#output = output;
    this.#resolvers = resolvers;
    this.#upstream = new Upstream(tuning.dnsTimeout);
  }

  /** A query over UDP. */
  input(datagram: Datagram): void {
    const { source, sourcePort } = datagram;
    void this.answer(Uint8Array.from(datagram.payload), false).then((answer) => {
      if (answer && !this.#closed) this.#output.send(DNS_SERVER, DNS_PORT, source, sourcePort, answer);
    });
  }

  /** A connection to the server. */
  openStream(): Duplex {
    return new DnsStream((query) => this.answer(query, true));
  }

  /** @returns the answer to a message; undefined when there is none to give. Never rejects. */
  async answer(query: Uint8Array, tcp: boolean): Promise<Uint8Array | undefined> {
    if (!isQuery(query)) {
      this.#counters.dropped.malformed++;
      return undefined;
    }
    if (this.#active >= this.#tuning.dnsQueries) {
      this.#counters.dropped.limit++;
      return undefined;
    }
    this.#active++;
    this.#counters.dnsQueries++;
    try {
      const question = parseQuestion(query);
      if (!question) return respond(query, undefined, ResponseCode.FORMAT);
      if (!(await this.#allowed(question))) return respond(query, question, ResponseCode.REFUSED);
      return (await this.#forward(query, tcp)) ?? (await this.#lookUp(query, question));
    } finally {
      this.#active--;
    }
  }

  #allowed({ name }: Question): Promise<boolean> {
    const flow = () => ({ protocol: 'dns', address: formatAddress(DNS_SERVER), port: DNS_PORT, name }) as const;
    return new Promise((resolve) => this.#policy.decide(flow, resolve));
  }

  async #forward(query: Uint8Array, tcp: boolean): Promise<Uint8Array | undefined> {
    for (const resolver of this.#resolvers ?? hostResolvers()) {
      if (this.#closed) return undefined;
      const answer = await (tcp ? this.#upstream.askTcp(resolver, query) : this.#upstream.askUdp(resolver, query));
      if (answer) return answer;
    }
    return undefined;
  }

  /** What the system's resolver knows, for instance from /etc/hosts. */
  async #lookUp(query: Uint8Array, question: Question): Promise<Uint8Array> {
    if (!question.internet || this.#lookups >= MAX_LOOKUPS || this.#closed) return this.#failed(query, question);
    this.#lookups++;
    try {
      const data = await lookUpRecords(question);
      return data ? respond(query, question, ResponseCode.NO_ERROR, data, LOOKUP_TTL) : this.#failed(query, question);
    } catch (error) {
      const unknown = (error as NodeJS.ErrnoException).code === 'ENOTFOUND';
      return unknown ? respond(query, question, ResponseCode.NO_SUCH_NAME) : this.#failed(query, question);
    } finally {
      this.#lookups--;
    }
  }

  #failed(query: Uint8Array, question: Question): Uint8Array {
    this.#counters.dnsFailed++;
    return respond(query, question, ResponseCode.SERVER_FAILURE);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#upstream.close();
  }
}

function hostResolvers(): Resolver[] {
  return dns
    .getServers() // of the module: a program may have called setServers()
    .map(parseResolver)
    .filter((resolver) => resolver !== undefined);
}

/** @returns undefined for types that the system's resolver does not do. Rejects when it finds nothing. */
async function lookUpRecords({ name, type }: Question): Promise<Uint8Array[] | undefined> {
  if (name.includes('\\')) return undefined;
  if (type === RecordType.PTR) {
    const address = reverseAddress(name);
    if (address === undefined) return undefined;
    const encoded = encodeName((await lookupName(address, 0)).hostname);
    return encoded ? [encoded] : undefined;
  }
  if ((type !== RecordType.A && type !== RecordType.AAAA) || name === '') return undefined;
  // All families: a name that has only the other one exists.
  const addresses = await lookupAddresses(name, { all: true });
  const family = type === RecordType.A ? 4 : 6;
  return addresses.filter((found) => found.family === family).map((found) => addressBytes(found.address, family));
}

/** `127.0.0.1` for `1.0.0.127.in-addr.arpa`. */
function reverseAddress(name: string): string | undefined {
  const match = /^(\d+)\.(\d+)\.(\d+)\.(\d+)\.in-addr\.arpa$/.exec(name);
  const address = match?.slice(1).reverse().join('.');
  return address && parseAddress(address) >= 0 ? address : undefined;
}

function addressBytes(address: string, family: 4 | 6): Uint8Array {
  if (family === 4) {
    const bytes = new Uint8Array(4);
    put32(bytes, 0, parseAddress(address));
    return bytes;
  }
  // The URL parser writes an IPv6 address in its shortest form, with an IPv4 tail in hexadecimal.
  const text = new URL(`http://[${address.replace(/%.*/, '')}]`).hostname.slice(1, -1);
  const [head = '', tail] = text.split('::');
  const before = head ? head.split(':') : [];
  const after = tail ? tail.split(':') : [];
  const groups =
    tail === undefined ? before : [...before, ...Array(8 - before.length - after.length).fill('0'), ...after];
  const bytes = new Uint8Array(16);
  groups.forEach((group, i) => {
    put16(bytes, 2 * i, Number.parseInt(group, 16));
  });
  return bytes;
}

/**
 * The server's end of a TCP connection of the guest: messages behind their length (RFC 1035 section 4.2.2), one after the
 * other, and none before the guest has read the answer to the last.
 */
class DnsStream extends Duplex {
  readonly #answer: (query: Uint8Array) => Promise<Uint8Array | undefined>;
  #received: Buffer = Buffer.alloc(0);
  #onRead: (() => void) | undefined;

  constructor(answer: (query: Uint8Array) => Promise<Uint8Array | undefined>) {
    super({ allowHalfOpen: true });
    this.#answer = answer;
  }

  override _read(): void {
    this.#onRead?.();
    this.#onRead = undefined;
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error) => void): void {
    this.#received = Buffer.concat([this.#received, chunk]);
    void this.#answerAll().then(() => done(), done);
  }

  async #answerAll(): Promise<void> {
    while (this.#received.length >= 2) {
      const length = u16(this.#received, 0);
      if (length > MAX_QUERY) throw new Error('not a DNS query');
      if (this.#received.length < 2 + length) return;
      const answer = await this.#answer(this.#received.subarray(2, 2 + length));
      this.#received = this.#received.subarray(2 + length);
      if (this.destroyed) return;
      if (!answer) throw new Error('not answered');
      const size = Buffer.alloc(2);
      put16(size, 0, answer.length);
      if (!this.push(Buffer.concat([size, answer]))) {
        await new Promise<void>((resolve) => {
          this.#onRead = resolve;
        });
      }
    }
  }

  override _final(done: () => void): void {
    this.push(null);
    done();
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    this.#onRead?.();
    done(error);
  }
}
