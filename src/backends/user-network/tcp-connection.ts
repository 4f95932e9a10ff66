import { randomInt } from 'node:crypto';
import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { Counters } from './counters.js';
import { LazyTimer } from './lazy-timer.js';
import type { Link } from './link.js';
import type { TcpMemory } from './tcp-memory.js';
import { OUR_WINDOW_SCALE, TcpReceiver } from './tcp-receiver.js';
import { type Endpoints, Flag, LINK_MSS, type Segment, sequenceDifference, type TcpOutput } from './tcp-segments.js';
import { Acked, TcpSender } from './tcp-sender.js';
import type { Tuning } from './tuning.js';

/** Attempts of a SYN-ACK that the guest does not answer, and of a SYN; those go on for as long as a guest may boot. */
const SYN_ACK_RETRIES = 5;
const SYN_RETRIES = 40;
/** The longest interval between SYNs, in milliseconds: a guest that has just booted is noticed soon. */
const SYN_INTERVAL = 4000;
/** Unanswered probes after which an idle guest is gone. */
const KEEP_ALIVE_PROBES = 5;

export const State = {
  /** The guest's SYN came; the host side is being decided on and connected. */
  CONNECTING: 0,
  SYN_RECEIVED: 1,
  SYN_SENT: 2,
  /** From here on FINs and not states tell how far the connection is. */
  OPEN: 3,
  TIME_WAIT: 4,
  /** The guest's side is over; the host stream may still have to send what it was given. */
  LINGERING: 5,
  CLOSED: 6,
} as const;
export type State = (typeof State)[keyof typeof State];

/** What a connection needs of the whole. */
export interface TcpContext {
  readonly tuning: Tuning;
  readonly counters: Counters;
  readonly memory: TcpMemory;
  readonly link: Link;
  readonly output: TcpOutput;
  /** Has the connection's flush() called at the end of this turn of the event loop. */
  schedule(connection: TcpConnection): void;
  /** Has it called when the link takes data again, or when there is memory again. */
  waitForLink(connection: TcpConnection): void;
  waitForMemory(connection: TcpConnection): void;
  stateChanged(connection: TcpConnection, from: State): void;
}

/** One TCP connection of the guest (RFC 9293), spliced to a stream of the host. */
export class TcpConnection implements Endpoints {
  readonly #context: TcpContext;
  readonly guestAddress: number;
  readonly guestPort: number;
  readonly remoteAddress: number;
  readonly remotePort: number;
  #state: State;
  #stream: Duplex | undefined;
  #streamClosed = false;
  #reading = false;
  readonly #receiver: TcpReceiver;
  readonly #sender: TcpSender;
  /** The guest's first sequence number. */
  #guestInitial = 0;
  #scaled = false;
  #acknowledgeNow = false;
  /** We sent our FIN before the guest's came: we wait for stray segments at the end. */
  #activeClose = false;
  #lastHeard = performance.now();
  readonly #timer = new LazyTimer(() => this.#timeout());
  readonly #ackTimer = new LazyTimer(() => {
    this.#acknowledgeNow = true;
    this.#context.schedule(this);
  });

  constructor(context: TcpContext, endpoints: Endpoints, state: 0 | 2) {
    this.#context = context;
    this.guestAddress = endpoints.guestAddress;
    this.guestPort = endpoints.guestPort;
    this.remoteAddress = endpoints.remoteAddress;
    this.remotePort = endpoints.remotePort;
    this.#state = state;
    this.#receiver = new TcpReceiver(context.tuning, context.memory, () => context.schedule(this));
    this.#sender = new TcpSender(context.tuning, context.memory, randomInt(2 ** 32));
  }

  get state(): State {
    return this.#state;
  }

  /** The sequence number of the guest's SYN. */
  get guestInitialSequence(): number {
    return this.#guestInitial;
  }

  /** The next sequence number that is expected of the guest. */
  get expected(): number {
    return this.#receiver.next;
  }

  #become(state: State): void {
    const from = this.#state;
    this.#state = state;
    this.#context.stateChanged(this, from);
  }

  // ---- Opening

  /** A SYN of the guest: what it says, for when the host side is connected. */
  accept(syn: Segment): void {
    this.#guestInitial = syn.sequence;
    this.#takeSyn(syn);
  }

  #takeSyn(syn: Segment): void {
    this.#scaled = syn.windowScale >= 0;
    this.#receiver.start(syn.sequence, this.#scaled);
    this.#sender.peer(syn, this.#scaled);
  }

  /** The stream to the host. It is watched from now on, and read when the connection is open. */
  attach(stream: Duplex): void {
    this.#stream = stream;
    this.#receiver.stream = stream;
    stream.on('error', () => {}); // 'close' follows
    stream.on('close', () => this.#hostClosed());
    // A host that says nothing and ends may have done so before the guest's side is open.
    stream.on('end', () => {
      this.#sender.finish();
      this.#context.schedule(this);
    });
  }

  /** The host side is connected: the guest may know. */
  connected(): void {
    if (this.#state !== State.CONNECTING) return;
    this.#become(State.SYN_RECEIVED);
    this.#sendSyn();
  }

  /** Opens the connection to the guest. */
  open(): void {
    this.#sendSyn();
  }

  #sendSyn(): void {
    const sequence = this.#sender.una;
    this.#sender.synSent();
    const { output } = this.#context;
    const window = this.#receiver.synWindow;
    if (this.#state === State.SYN_SENT) output.sendSyn(this, Flag.SYN, sequence, 0, window, OUR_WINDOW_SCALE);
    else {
      const scale = this.#scaled ? OUR_WINDOW_SCALE : -1;
      output.sendSyn(this, Flag.SYN | Flag.ACK, sequence, this.#receiver.next, window, scale);
    }
    const { timeout } = this.#sender;
    this.#timer.set(this.#state === State.SYN_SENT ? Math.min(timeout, SYN_INTERVAL) : timeout);
  }

  #opened(): void {
    this.#context.counters.tcpOpened++;
    this.#timer.clear();
    this.#become(State.OPEN);
    const stream = this.#stream as Duplex;
    stream.on('data', (chunk: Buffer) => this.#hostData(chunk));
    this.#reading = true;
    stream.resume();
  }

  // ---- Segments from the guest

  input(segment: Segment): void {
    this.#lastHeard = performance.now();
    switch (this.#state) {
      case State.CONNECTING:
        if (segment.has(Flag.RST) && segment.sequence === this.#receiver.next) this.abort(false);
        return;
      case State.SYN_SENT:
        this.#synSentInput(segment);
        return;
      case State.TIME_WAIT:
        if (!segment.has(Flag.RST)) this.#sendAck(); // RFC 1337: a reset must not end it
        return;
      case State.LINGERING:
      case State.CLOSED:
        return;
      default:
        this.#openInput(segment);
        return;
    }
  }

  #synSentInput(segment: Segment): void {
    const acked = segment.has(Flag.ACK);
    if (acked && segment.acknowledgement !== this.#sender.next) {
      if (!segment.has(Flag.RST)) this.#context.output.send(this, Flag.RST, segment.acknowledgement, 0, 0);
      return;
    }
    if (!acked) return;
    if (segment.has(Flag.RST)) {
      this.abort(false);
      return;
    }
    if (!segment.has(Flag.SYN)) return;
    this.#takeSyn(segment);
    this.#sender.acknowledge(segment, LINK_MSS);
    this.#acknowledgeNow = true;
    this.#opened();
    this.#context.schedule(this);
  }

  #openInput(segment: Segment): void {
    const receiver = this.#receiver;
    const length = segment.end - segment.start + (segment.has(Flag.FIN) ? 1 : 0);
    const ahead = sequenceDifference(segment.sequence, receiver.next);
    if (this.#state === State.SYN_RECEIVED && segment.has(Flag.SYN)) {
      if (segment.sequence === this.#guestInitial) this.#sendSyn(); // our answer was lost
      return;
    }
    if (ahead > receiver.window || ahead + length < 0) {
      if (!segment.has(Flag.RST)) this.#sendAck();
      return;
    }
    if (segment.has(Flag.RST)) {
      if (ahead === 0) this.abort(false);
      else this.#sendAck(); // RFC 5961: a guess gets a challenge
      return;
    }
    if (segment.has(Flag.SYN)) {
      this.#sendAck();
      return;
    }
    if (!segment.has(Flag.ACK) || !this.#takeAcknowledgement(segment)) return;
    if (length > 0) this.#takeData(segment, ahead);
    this.#context.schedule(this);
  }

  /** @returns whether the rest of the segment counts. */
  #takeAcknowledgement(segment: Segment): boolean {
    const sender = this.#sender;
    if (this.#state === State.SYN_RECEIVED) {
      if (segment.acknowledgement !== sender.next) {
        this.#context.output.send(this, Flag.RST, segment.acknowledgement, 0, 0);
        return false;
      }
      this.#opened();
    }
    const largest = this.#context.output.maximumSegment(sender.mss);
    switch (sender.acknowledge(segment, largest)) {
      case Acked.INVALID:
        this.#sendAck();
        return false;
      case Acked.RETRANSMIT:
        this.#context.counters.tcpRetransmissions++;
        sender.retransmit(largest, this.#emit);
        this.#timer.set(sender.timeout);
        return true;
      case Acked.NEW:
        if (sender.inFlight) this.#timer.set(sender.timeout);
        else this.#timer.clear();
        return true;
      default:
        return true;
    }
  }

  #takeData(segment: Segment, ahead: number): void {
    const receiver = this.#receiver;
    if (ahead > 0 || receiver.finished) {
      // The link keeps the order: something was dropped. The guest sends it again, after enough of these.
      this.#sendAck();
      return;
    }
    const start = segment.start - ahead;
    if (start < segment.end) receiver.accept(segment.bytes, start, segment.end);
    else this.#acknowledgeNow = true; // it is here already
    const end = segment.sequence + (segment.end - segment.start);
    if (!segment.has(Flag.FIN) || end >>> 0 !== receiver.next) return;
    this.#activeClose = this.#sender.finSent;
    receiver.finish();
    this.#acknowledgeNow = true;
  }

  // ---- Segments to the guest

  /** Sends what is to be sent in either direction: once for all that a turn of the event loop brought. */
  flush(): void {
    this.#receiver.flush();
    if (this.#state !== State.OPEN) return;
    this.#transmit();
    if (this.#state !== State.OPEN) return;
    this.#acknowledge();
    this.#readMore();
    this.#settleGuest();
  }

  #transmit(): void {
    const { link, output } = this.#context;
    const sender = this.#sender;
    const before = sender.next;
    sender.transmit(output.maximumSegment(sender.mss), this.#ready, this.#emit);
    if (sender.next !== before || (sender.waitsForWindow && !link.full && !this.#timer.armed)) {
      if (!this.#timer.armed || sender.next !== before) this.#timer.set(sender.timeout);
    }
  }

  readonly #ready = (): boolean => {
    if (!this.#context.link.full) return true;
    this.#context.waitForLink(this);
    return false;
  };

  readonly #emit = (
    sequence: number,
    queue: Parameters<TcpOutput['sendData']>[5],
    offset: number,
    length: number,
    fin: boolean,
  ): void => {
    this.#acknowledged();
    const last = offset + length === queue.length;
    const flags = Flag.ACK | (last && length > 0 ? Flag.PSH : 0) | (fin ? Flag.FIN : 0);
    const window = this.#receiver.advertise();
    const { output } = this.#context;
    output.sendData(this, flags, sequence, this.#receiver.next, window, queue, offset, length, this.#sender.mss);
  };

  /** Acknowledges when there is reason to, and as seldom as that allows: each costs the guest much. */
  #acknowledge(): void {
    const receiver = this.#receiver;
    const { unacknowledged } = receiver;
    // Data that the host has not taken waits, so that its acknowledgement opens the window again too.
    const taken = receiver.held <= this.#context.tuning.receiveBuffer / 2;
    if (this.#acknowledgeNow || (unacknowledged >= 2 * LINK_MSS && taken) || receiver.windowUpdateDue())
      this.#sendAck();
    else if (unacknowledged > 0 && !this.#ackTimer.armed) this.#ackTimer.set(this.#context.tuning.delayedAck);
    if (receiver.starved) this.#context.waitForMemory(this);
  }

  #acknowledged(): void {
    this.#acknowledgeNow = false;
    this.#ackTimer.clear();
  }

  #sendAck(): void {
    this.#acknowledged();
    const window = this.#receiver.advertise();
    this.#context.output.send(this, Flag.ACK, this.#sender.next, this.#receiver.next, window);
  }

  /** A segment that is one byte too old: it makes the guest acknowledge, with its window. */
  #sendProbe(): void {
    const window = this.#receiver.advertise();
    this.#context.output.send(this, Flag.ACK, (this.#sender.una - 1) >>> 0, this.#receiver.next, window);
  }

  #timeout(): void {
    const context = this.#context;
    const sender = this.#sender;
    switch (this.#state) {
      case State.SYN_RECEIVED:
      case State.SYN_SENT: {
        const retries = this.#state === State.SYN_SENT ? SYN_RETRIES : SYN_ACK_RETRIES;
        if (!sender.expired(LINK_MSS, retries)) {
          this.abort(true);
          return;
        }
        this.#sendSyn();
        return;
      }
      case State.OPEN:
        break;
      case State.TIME_WAIT:
        this.linger();
        return;
      default:
        this.abort(false);
        return;
    }
    if (context.link.pending) {
      this.#timer.set(sender.timeout); // the device has not read what was sent: the guest cannot know of it
    } else if (sender.inFlight) {
      const largest = context.output.maximumSegment(sender.mss);
      if (!sender.expired(largest, context.tuning.retries)) {
        this.abort(true);
        return;
      }
      context.counters.tcpRetransmissions++;
      context.schedule(this);
    } else if (sender.waitsForWindow) {
      if (!sender.probed(context.tuning.retries)) {
        this.abort(true);
        return;
      }
      this.#sendProbe();
      this.#timer.set(sender.timeout);
    }
  }

  /** Looks whether the guest is still there. */
  sweep(now: number): void {
    if (this.#state !== State.OPEN || now - this.#lastHeard < this.#context.tuning.keepAlive) return;
    if (this.#sender.inFlight || this.#sender.waitsForWindow) return; // then the timer finds out
    if (!this.#sender.probed(KEEP_ALIVE_PROBES)) {
      this.abort(true);
      return;
    }
    this.#sendProbe();
  }

  // ---- The host's side

  #hostData(chunk: Buffer): void {
    if (this.#state !== State.OPEN) return;
    this.#sender.push(chunk);
    if (this.#sender.held >= this.#context.tuning.sendBuffer || this.#context.memory.free === 0) {
      this.#reading = false;
      this.#stream?.pause();
    }
    this.#context.schedule(this);
  }

  #readMore(): void {
    if (this.#reading || this.#sender.held > this.#context.tuning.sendBuffer / 2) return;
    if (this.#context.memory.free === 0) {
      this.#context.waitForMemory(this);
      return;
    }
    this.#reading = true;
    this.#stream?.resume();
  }

  #hostClosed(): void {
    this.#streamClosed = true;
    if (this.#state === State.CLOSED || this.#state === State.TIME_WAIT) return;
    if (this.#state === State.LINGERING) {
      this.abort(false);
      return;
    }
    const stream = this.#stream as Duplex;
    // After both ends it has closed in good order, and the guest gets the rest.
    if (stream.errored || !stream.readableEnded || !stream.writableFinished) this.abort(true);
  }

  // ---- Closing

  /** Both directions to the guest are finished: what is left is the host's. */
  #settleGuest(): void {
    if (!this.#sender.finAcked || !this.#receiver.finished) return;
    this.#ackTimer.dispose();
    this.#sender.dispose();
    if (this.#activeClose) {
      this.#become(State.TIME_WAIT);
      this.#timer.set(this.#context.tuning.timeWait);
    } else {
      this.linger();
    }
  }

  /** The guest's side is over: the stream may take a while to send what it has. */
  linger(): void {
    if (this.#streamClosed) {
      this.abort(false);
      return;
    }
    this.#become(State.LINGERING);
    this.#timer.set(this.#context.tuning.linger);
  }

  /** Ends it here and now. @param tell whether the guest gets a reset. */
  abort(tell: boolean): void {
    if (this.#state === State.CLOSED) return;
    const known = this.#state === State.SYN_RECEIVED || this.#state === State.OPEN;
    if (tell && known) {
      this.#context.output.send(this, Flag.RST | Flag.ACK, this.#sender.next, this.#receiver.next, 0);
    } else if (tell && this.#state === State.SYN_SENT) {
      this.#context.output.send(this, Flag.RST, this.#sender.next, 0, 0);
    }
    this.#timer.dispose();
    this.#ackTimer.dispose();
    this.#sender.dispose();
    this.#receiver.dispose();
    if (this.#stream && !this.#streamClosed) reset(this.#stream);
    this.#become(State.CLOSED);
  }
}

/** Ends a stream; if it is a TCP socket with a reset, since its data did not all arrive. */
function reset(stream: Duplex): void {
  // A socket that is still connecting or shutting down cannot be reset.
  const settled = !stream.destroyed && (!stream.writableEnded || stream.writableFinished);
  if (stream instanceof Socket && !stream.connecting && settled) stream.resetAndDestroy();
  else stream.destroy();
}
