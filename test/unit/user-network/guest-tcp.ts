import { Guest } from './guest.js';
import { ACK, FIN, GATEWAY, GUEST, RST, SYN, type TcpSegment, tcp } from './packets.js';

/** Milliseconds after which the guest sends again what was not acknowledged. */
const RETRANSMIT = 100;

function difference(a: number, b: number): number {
  return (a - b) | 0;
}

export interface GuestTcpOptions {
  mss?: number;
  /** -1: no window scaling. */
  windowScale?: number;
  /** Bytes that wait for the reader before the window closes. */
  window?: number;
  /** Segments without checksum and of up to this many bytes, as a guest with TSO sends them. */
  largeSegments?: number;
}

/** A connection of the mock guest: correct but simple; it sends all that the window allows and acknowledges everything. */
export class GuestConnection {
  readonly #tcp: GuestTcp;
  readonly remote: string;
  readonly remotePort: number;
  readonly port: number;
  readonly #options: Required<GuestTcpOptions>;
  #out = Buffer.alloc(0);
  #una = 0x7fff_fff0 + Math.floor(Math.random() * 0x1000_0000); // numbers wrap soon
  #next = this.#una;
  #peerWindow = 0;
  #peerScale = 0;
  peerMss = 536;
  peerScale = -1;
  #ending = false;
  #finSent = false;
  #expected = 0;
  readonly #early = new Map<number, Buffer>();
  #timer: NodeJS.Timeout | undefined;
  #duplicates = 0;
  state: 'opening' | 'open' | 'reset' = 'opening';
  /** What came and was not read. */
  #in: Buffer[] = [];
  unread = 0;
  received = 0;
  ended = false;
  finAcked = false;
  #reading = true;
  #changed: (() => void)[] = [];
  /** The window we announced last, in bytes, and what the peer announces. */
  #announced = 0;
  segments = 0;
  acks = 0;

  constructor(owner: GuestTcp, remote: string, remotePort: number, port: number, options: GuestTcpOptions) {
    this.#tcp = owner;
    this.remote = remote;
    this.remotePort = remotePort;
    this.port = port;
    this.#options = { mss: 1460, windowScale: 7, window: 256 * 1024, largeSegments: 0, ...options };
  }

  get peerWindow(): number {
    return this.#peerWindow;
  }

  get unacknowledged(): number {
    return this.#out.length;
  }

  // ---- Sending

  open(): void {
    this.#sendSyn(SYN);
    this.#next = (this.#una + 1) >>> 0;
    this.#arm();
  }

  #sendSyn(flags: number): void {
    const { mss, windowScale } = this.#options;
    const scale = windowScale < 0 ? [] : [1, 3, 3, windowScale];
    const options = Buffer.from([2, 4, mss >> 8, mss & 255, ...scale]);
    this.#send(this.#una, flags, undefined, options);
  }

  /** The network's SYN to this listening guest. */
  accept(segment: TcpSegment): void {
    this.#takeSyn(segment);
    this.#sendSyn(SYN | ACK);
    this.#next = (this.#una + 1) >>> 0;
    this.#arm();
  }

  #takeSyn(segment: TcpSegment): void {
    this.#expected = (segment.sequence + 1) >>> 0;
    this.#peerWindow = segment.window;
    for (let at = 0; at < segment.options.length; ) {
      const kind = segment.options[at];
      if (kind === 1) {
        at++;
        continue;
      }
      if (kind === 2) this.peerMss = segment.options.readUInt16BE(at + 2);
      if (kind === 3) this.peerScale = segment.options.readUInt8(at + 2);
      at += segment.options.readUInt8(at + 1);
    }
    if (this.peerScale >= 0 && this.#options.windowScale >= 0) this.#peerScale = this.peerScale;
  }

  write(data: Uint8Array): void {
    this.#out = Buffer.concat([this.#out, data]);
    this.#transmit();
  }

  end(): void {
    this.#ending = true;
    this.#transmit();
  }

  reset(): void {
    this.#send(this.#next, RST | ACK);
    this.#die();
  }

  #transmit(): void {
    if (this.state !== 'open') return;
    const largest = this.#options.largeSegments || this.peerMss;
    for (;;) {
      const offset = difference(this.#next, this.#una);
      const length = Math.min(this.#out.length - offset, this.#peerWindow - offset, largest);
      if (length <= 0) break;
      this.#send(this.#next, ACK, this.#out.subarray(offset, offset + length));
      this.#next = (this.#next + length) >>> 0;
    }
    const offset = difference(this.#next, this.#una);
    if (this.#ending && !this.finAcked && offset === this.#out.length) {
      this.#send(this.#next, FIN | ACK);
      this.#finSent = true;
      this.#next = (this.#next + 1) >>> 0;
    }
    this.#arm();
  }

  #arm(): void {
    if (this.#timer || this.state === 'reset') return;
    if (this.#next === this.#una && this.#out.length === 0) return;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      if (this.state === 'opening') {
        this.#sendSyn(this.#expected ? SYN | ACK : SYN);
        this.#arm();
      } else if (this.#next !== this.#una) {
        this.#goBack();
      } else if (this.#out.length > 0) {
        this.#send(this.#next, ACK, this.#out.subarray(0, 1)); // a probe of the closed window
        this.#arm();
      }
    }, RETRANSMIT);
  }

  #goBack(): void {
    this.#next = this.#una;
    this.#finSent = false;
    this.#transmit();
  }

  #send(sequence: number, flags: number, payload?: Buffer, options?: Buffer): void {
    const scale = flags & SYN || this.peerScale < 0 ? 0 : Math.max(0, this.#options.windowScale);
    const room = Math.max(0, this.#options.window - this.unread);
    const window = Math.min(65535, room >>> scale);
    this.#announced = window << scale;
    const { port: sourcePort, remotePort: destinationPort } = this;
    const acknowledgement = this.#expected;
    const fields = { sourcePort, destinationPort, sequence, acknowledgement, flags, window };
    const partial = this.#options.largeSegments > 0 && payload !== undefined;
    const datagram = tcp(
      this.remote,
      { ...fields, ...(payload && { payload }), ...(options && { options }) },
      GUEST,
      partial,
    );
    const large = (payload?.length ?? 0) > this.peerMss;
    this.#tcp.guest.send(datagram, partial ? Guest.offloadHeader(this.peerMss, large) : undefined);
  }

  // ---- Receiving

  input(segment: TcpSegment): void {
    this.segments++;
    if (segment.payload.length === 0) this.acks++;
    if (segment.flags & RST) {
      this.#die();
      return;
    }
    if (this.state === 'opening') this.#opening(segment);
    else if (segment.flags & SYN) this.#send(this.#next, ACK);
    if (this.state !== 'open') return;
    this.#takeAck(segment);
    this.#takeData(segment);
    this.#notify();
  }

  #opening(segment: TcpSegment): void {
    if (!(segment.flags & ACK) || segment.acknowledgement !== this.#next) return;
    if (segment.flags & SYN) {
      this.#takeSyn(segment);
      this.#send(this.#next, ACK);
    }
    this.#una = this.#next;
    this.state = 'open';
  }

  #takeAck(segment: TcpSegment): void {
    const scale = segment.flags & SYN ? 0 : this.#peerScale;
    const count = difference(segment.acknowledgement, this.#una);
    if (count < 0) return;
    this.#peerWindow = segment.window << scale;
    if (count > 0) {
      const data = Math.min(count, this.#out.length);
      if (count > data && this.#finSent) this.finAcked = true;
      this.#out = this.#out.subarray(data);
      this.#una = segment.acknowledgement;
      if (difference(this.#una, this.#next) > 0) this.#next = this.#una;
      this.#duplicates = 0;
      clearTimeout(this.#timer);
      this.#timer = undefined;
    } else if (segment.payload.length === 0 && this.#next !== this.#una && ++this.#duplicates === 3) {
      this.#goBack();
    }
    this.#transmit();
  }

  #takeData(segment: TcpSegment): void {
    const length = segment.payload.length + (segment.flags & FIN);
    if (segment.flags & SYN) return;
    const ahead = difference(segment.sequence, this.#expected);
    if (length === 0) {
      if (ahead < 0) this.#send(this.#next, ACK); // a probe
      return;
    }
    if (difference(segment.sequence + segment.payload.length, this.#expected + Math.max(1, this.#announced)) > 0) {
      this.#tcp.guest.faults.push(`data beyond the window: ${ahead}+${segment.payload.length} > ${this.#announced}`);
    }
    if (ahead > 0)
      this.#early.set(segment.sequence, Buffer.concat([segment.payload, Buffer.from([segment.flags & FIN])]));
    else this.#takeInOrder(segment.sequence, segment.payload, (segment.flags & FIN) !== 0);
    for (const [sequence, early] of [...this.#early].sort((a, b) => difference(a[0], b[0]))) {
      if (difference(sequence, this.#expected) > 0) break;
      this.#early.delete(sequence);
      this.#takeInOrder(sequence, early.subarray(0, -1), early.at(-1) !== 0);
    }
    this.#send(this.#next, ACK);
  }

  #takeInOrder(sequence: number, payload: Buffer, fin: boolean): void {
    const fresh = payload.subarray(difference(this.#expected, sequence));
    if (difference((sequence + payload.length) >>> 0, this.#expected) > 0) {
      this.#expected = (this.#expected + fresh.length) >>> 0;
      this.received += fresh.length;
      this.#in.push(fresh);
      this.unread += fresh.length;
      if (this.#reading) this.#consume();
    }
    if (fin && (sequence + payload.length) >>> 0 === this.#expected) {
      this.ended = true;
      this.#expected = (this.#expected + 1) >>> 0;
    }
  }

  #taken: Buffer[] = [];

  #consume(): void {
    this.#taken.push(...this.#in);
    this.#in = [];
    this.unread = 0;
  }

  /** What was read so far. */
  get data(): Buffer {
    return Buffer.concat(this.#taken);
  }

  /** Lets the window close as data comes. */
  pause(): void {
    this.#reading = false;
  }

  resume(): void {
    this.#reading = true;
    this.#consume();
    this.#send(this.#next, ACK);
  }

  #die(): void {
    this.state = 'reset';
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#notify();
  }

  dispose(): void {
    clearTimeout(this.#timer);
    this.state = 'reset';
  }

  #notify(): void {
    for (const changed of this.#changed.splice(0)) changed();
  }

  /** Resolves when the condition holds; it is looked at after each segment. */
  async until(condition: (connection: this) => boolean): Promise<this> {
    while (!condition(this)) await new Promise<void>((resolve) => this.#changed.push(resolve));
    return this;
  }
}

/** The guest's TCP. */
export class GuestTcp {
  readonly guest: Guest;
  readonly #connections = new Map<string, GuestConnection>();
  readonly #listeners = new Map<number, (connection: GuestConnection) => void>();
  #nextPort = 40_000;
  listenOptions: GuestTcpOptions = {};

  constructor(guest: Guest) {
    this.guest = guest;
  }

  /** Resolves when the connection is open or refused. */
  connect(port: number, options: GuestTcpOptions = {}, address = GATEWAY): Promise<GuestConnection> {
    return this.start(port, options, address).until((connection) => connection.state !== 'opening');
  }

  start(port: number, options: GuestTcpOptions = {}, address = GATEWAY): GuestConnection {
    const connection = new GuestConnection(this, address, port, this.#nextPort++, options);
    this.#connections.set(`${connection.port} ${address} ${port}`, connection);
    connection.open();
    return connection;
  }

  listen(port: number, accepted: (connection: GuestConnection) => void): void {
    this.#listeners.set(port, accepted);
  }

  input(segment: TcpSegment): void {
    const { source } = segment.datagram;
    const key = `${segment.destinationPort} ${source} ${segment.sourcePort}`;
    const connection = this.#connections.get(key);
    if (connection) {
      connection.input(segment);
      return;
    }
    const accepted = this.#listeners.get(segment.destinationPort);
    if (accepted && segment.flags === SYN) {
      const opened = new GuestConnection(this, source, segment.sourcePort, segment.destinationPort, this.listenOptions);
      this.#connections.set(key, opened);
      opened.accept(segment);
      void opened.until((one) => one.state !== 'opening').then(accepted);
    } else if (!(segment.flags & RST)) {
      const { sourcePort: destinationPort, destinationPort: sourcePort } = segment;
      const sequence = segment.flags & ACK ? segment.acknowledgement : 0;
      const acknowledgement = segment.sequence + segment.payload.length + (segment.flags & (SYN | FIN) ? 1 : 0);
      this.guest.send(tcp(source, { sourcePort, destinationPort, sequence, acknowledgement, flags: RST | ACK }));
    }
  }

  /** As after a reboot. */
  forget(): void {
    this.dispose();
    this.#connections.clear();
  }

  dispose(): void {
    for (const connection of this.#connections.values()) connection.dispose();
  }
}
