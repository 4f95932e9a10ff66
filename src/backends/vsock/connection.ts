import { VsockError } from '../../errors.js';
import {
  VIRTIO_VSOCK_OP_CREDIT_REQUEST as CREDIT_REQUEST,
  VIRTIO_VSOCK_OP_CREDIT_UPDATE as CREDIT_UPDATE,
  VIRTIO_VSOCK_OP_RST as RST,
  VIRTIO_VSOCK_OP_RW as RW,
  VIRTIO_VSOCK_OP_SHUTDOWN as SHUTDOWN,
  VIRTIO_VSOCK_SHUTDOWN_RCV as SHUTDOWN_RCV,
  VIRTIO_VSOCK_SHUTDOWN_SEND as SHUTDOWN_SEND,
  VIRTIO_VSOCK_TYPE_STREAM as STREAM,
} from '../../virtio/generated/virtio.js';
import { ByteQueue } from '../byte-queue.js';
import type { VsockLink } from './link.js';
import { MAX_PAYLOAD, type PacketHeader } from './packet.js';
import { type StreamSource, VsockStream } from './stream.js';

const SHUTDOWN_BOTH = SHUTDOWN_RCV | SHUTDOWN_SEND;
/** Milliseconds that a guest may take to confirm the end of a connection, as Linux (VSOCK_CLOSE_TIMEOUT). */
const CLOSE_TIMEOUT = 8000;
/** The guest hears of room in our buffer when so much of it is new to it, as a part of the whole. */
const CREDIT_STEP = 1 / 4;
const UNSENT = 'it says that it took bytes which it was not sent';

type Callback = (error?: Error | null) => void;

/** What a connection is part of. */
export interface ConnectionOwner {
  /** Calls connection.pump() once the link has room. */
  awaitLink(connection: Connection): void;
  /** The ports are free again: the guest has no such connection any more, or was told so. */
  closed(connection: Connection): void;
  /** Tells of what a guest did wrong. */
  warn(message: string): void;
}

/**
 * One connection (virtio 1.2 section 5.10.6.5): packets on one side, a stream on the other. Data from the guest waits
 * here for its reader, no more than the guest was given credit for; data for the guest waits in the stream's writer.
 */
export class Connection implements StreamSource {
  readonly localPort: number;
  readonly remotePort: number;
  readonly stream: VsockStream;
  readonly #link: VsockLink;
  readonly #owner: ConnectionOwner;
  /** The guest and we can still send packets of it. */
  #open = true;
  /** Bytes that may wait for the reader. */
  readonly #buffer: number;
  readonly #received = new ByteQueue();
  /** The stream wants data. */
  #reading = false;
  #endRead = false;
  /** Bytes that the reader took, modulo 2^32, and what of that the guest was told. */
  #forwarded = 0;
  #toldForwarded = 0;
  /** What the stream writes: how much of it is sent, and who is told when all is. */
  #writing: Uint8Array | undefined;
  #written = 0;
  #writeDone: Callback | undefined;
  /** Bytes sent, modulo 2^32, and what the guest says of its buffer. */
  #sent = 0;
  #peerBuffer = 0;
  #peerForwarded = 0;
  /** The guest was asked for credit and has not answered. */
  #asked = false;
  /** Masks of SHUTDOWN_RCV and SHUTDOWN_SEND: what is said of either side. */
  #shutdown = 0;
  #peerShutdown = 0;
  #closeTimer: NodeJS.Timeout | undefined;

  /** @param buffer bytes that may wait for the reader. */
  constructor(link: VsockLink, owner: ConnectionOwner, localPort: number, remotePort: number, buffer: number) {
    this.#link = link;
    this.#owner = owner;
    this.localPort = localPort;
    this.remotePort = remotePort;
    this.#buffer = buffer;
    this.stream = new VsockStream(this);
  }

  get key(): string {
    return connectionKey(this.localPort, this.remotePort);
  }

  /** Sends a packet without data. */
  send(op: number, flags = 0): void {
    this.#link.send(this.#header(op, flags));
  }

  /** The guest agreed to the connection, or asked for it. @returns false when that broke the protocol. */
  establish({ bufAlloc, fwdCnt }: PacketHeader): boolean {
    this.#peerBuffer = bufAlloc;
    if (fwdCnt !== 0) this.violated(UNSENT);
    return this.#open;
  }

  /** A packet of the guest on an established connection. */
  receive(header: PacketHeader, payload: Uint8Array): void {
    const { op, flags } = header;
    if (op === RST) {
      this.close(this.#finishing ? undefined : new VsockError(`${this.#name}: the guest reset the connection`));
      return;
    }
    const advanced = (header.fwdCnt - this.#peerForwarded) >>> 0;
    if (advanced > this.#inFlight) {
      this.violated(UNSENT);
      return;
    }
    this.#peerForwarded = header.fwdCnt;
    this.#peerBuffer = header.bufAlloc;
    if (op === RW) this.#data(payload);
    else if (op === SHUTDOWN) this.#peerShut(flags);
    else if (op === CREDIT_REQUEST) this.send(CREDIT_UPDATE);
    else if (op !== CREDIT_UPDATE) this.violated(`a packet of operation ${op}`);
    this.pump();
  }

  /** Sends what is to be sent, as far as the guest and the link have room. */
  pump(): void {
    while (this.#writing && this.#open) {
      if (this.#link.full) {
        this.#owner.awaitLink(this);
        return;
      }
      const credit = this.#peerBuffer - this.#inFlight;
      if (credit <= 0) {
        if (!this.#asked) this.send(CREDIT_REQUEST);
        this.#asked = true; // once: it tells by itself when its reader gets on
        return;
      }
      this.#asked = false;
      const bytes = this.#writing;
      const end = Math.min(bytes.length, this.#written + Math.min(credit, MAX_PAYLOAD));
      const part = bytes.subarray(this.#written, end);
      this.#sent = (this.#sent + part.length) >>> 0;
      this.#written = end;
      const last = end === bytes.length;
      if (last) this.#writing = undefined;
      this.#link.send(this.#header(RW), part, last ? () => this.#endWrite() : undefined);
    }
  }

  /**
   * There is no such connection any more, and the guest knows. Without an error the stream may still be read to its end.
   */
  close(error?: Error): void {
    if (this.#open) {
      this.#open = false;
      clearTimeout(this.#closeTimer);
      this.#owner.closed(this);
    }
    if (error) this.stream.destroy(error);
    else if (this.#writing) this.#endWrite(this.#unread());
  }

  /** The guest did what it may not: resets the connection. */
  violated(what: string): void {
    this.#owner.warn(`${this.#name}: the guest broke the protocol (${what}); the connection is reset`);
    this.send(RST);
    this.close(new VsockError(`${this.#name}: the guest broke the protocol: ${what}`));
  }

  read(): void {
    this.#reading = true;
    this.#deliver();
  }

  write(bytes: Uint8Array, done: Callback): void {
    if (!this.#open || this.#peerShutdown & SHUTDOWN_RCV) {
      done(this.#unread());
    } else if (bytes.length === 0) {
      done();
    } else {
      this.#writing = bytes;
      this.#written = 0;
      this.#writeDone = done;
      this.pump();
    }
  }

  final(done: Callback): void {
    this.#shut(SHUTDOWN_SEND);
    done();
  }

  destroy(error: Error | null): void {
    this.#endWrite(error ?? this.#unread());
    this.#received.clear();
    if (!this.#open || this.#finishing) return;
    this.send(RST);
    this.close();
  }

  get #name(): string {
    return `vsock: port ${this.remotePort} of the guest and ${this.localPort} of the host`;
  }

  /** Bytes that the guest has not taken from its buffer, as far as it has said. */
  get #inFlight(): number {
    return (this.#sent - this.#peerForwarded) >>> 0;
  }

  /** Both sides have said that they send no more. */
  get #finishing(): boolean {
    return (this.#shutdown & this.#peerShutdown & SHUTDOWN_SEND) !== 0;
  }

  #header(op: number, flags = 0): PacketHeader {
    const { localPort: srcPort, remotePort: dstPort } = this;
    this.#toldForwarded = this.#forwarded;
    return { srcPort, dstPort, type: STREAM, op, flags, bufAlloc: this.#buffer, fwdCnt: this.#forwarded };
  }

  #data(payload: Uint8Array): void {
    if (this.#peerShutdown & SHUTDOWN_SEND) {
      this.violated('data after its end');
    } else if (this.#received.length + payload.length > this.#buffer) {
      this.violated('more data than there is room for');
    } else {
      this.#received.push(payload);
      this.#deliver();
    }
  }

  #peerShut(flags: number): void {
    this.#peerShutdown |= flags & SHUTDOWN_BOTH;
    if (this.#peerShutdown === SHUTDOWN_BOTH) {
      this.send(RST); // what the guest waits for
      this.close();
    } else if (this.#finishing && this.#shutdown !== SHUTDOWN_BOTH) {
      this.#shut(SHUTDOWN_BOTH);
    }
    if (this.#peerShutdown & SHUTDOWN_RCV && this.#writing) this.#endWrite(this.#unread());
    this.#deliver();
  }

  #shut(flags: number): void {
    if (!this.#open) return;
    this.#shutdown |= flags;
    if (this.#finishing) this.#shutdown = SHUTDOWN_BOTH;
    this.send(SHUTDOWN, this.#shutdown);
    if (!this.#finishing) return;
    this.#closeTimer ??= setTimeout(() => {
      this.send(RST);
      this.close();
    }, CLOSE_TIMEOUT).unref();
  }

  /** Gives the stream what it wants of what there is. */
  #deliver(): void {
    const received = this.#received;
    while (this.#reading && received.length > 0) {
      const part = Buffer.allocUnsafe(Math.min(received.length, MAX_PAYLOAD));
      received.copyTo(part, 0, 0, part.length);
      received.consume(part.length);
      this.#forwarded = (this.#forwarded + part.length) >>> 0;
      this.#reading = false; // it may ask for more before push() returns
      if (this.stream.push(part)) this.#reading = true;
    }
    if (received.length === 0 && !this.#endRead && (this.#peerShutdown & SHUTDOWN_SEND) !== 0) {
      this.#endRead = true;
      this.stream.push(null);
    }
    const news = (this.#forwarded - this.#toldForwarded) >>> 0;
    if (this.#open && news >= this.#buffer * CREDIT_STEP) this.send(CREDIT_UPDATE);
  }

  #unread(): VsockError {
    return new VsockError(`${this.#name}: the guest reads no more`);
  }

  #endWrite(error?: Error | null): void {
    const done = this.#writeDone;
    this.#writing = this.#writeDone = undefined;
    done?.(error);
  }
}

export function connectionKey(localPort: number, remotePort: number): string {
  return `${localPort}:${remotePort}`;
}
