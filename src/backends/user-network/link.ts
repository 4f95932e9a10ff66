import type { Duplex } from 'node:stream';
import {
  ControlType,
  FrameStreamDecoder,
  LENGTH_SIZE,
  NET_HEADER_SIZE,
  NetHeader,
  putFrameLength,
} from '../frame-stream-format.js';
import { NETWORK_MAC } from './addresses.js';
import { put16, u16 } from './bytes.js';
import type { Counters } from './counters.js';
import { In, Out } from './ethernet.js';

/** Bytes waiting for the device at which TCP holds its data back, and at which everything else is dropped. */
const FULL = 256 * 1024;
const OVERFULL = 1024 * 1024;

export interface LinkListener {
  /** A frame whose Ethernet header is there and comes from a unicast MAC. */
  frame(bytes: Uint8Array): void;
  /** The link was full and is not any more. */
  drained(): void;
  /** The device is gone. */
  lost(): void;
}

/** The stream to the device: frames in and out, what the guest accepts, and the guest's MAC as its frames tell it. */
export class Link {
  readonly #counters: Counters;
  readonly #listener: LinkListener;
  #stream: Duplex | undefined;
  readonly #guestMac = new Uint8Array(6);
  #guestKnown = false;
  #offloads = 0;

  constructor(counters: Counters, listener: LinkListener) {
    this.#counters = counters;
    this.#listener = listener;
  }

  /** What the guest accepts: a mask of GuestOffload. */
  get offloads(): number {
    return this.#offloads;
  }

  get guestKnown(): boolean {
    return this.#guestKnown;
  }

  /** Whether data should wait for `drained`. */
  get full(): boolean {
    const stream = this.#stream;
    return stream?.writableNeedDrain === true && stream.writableLength >= FULL;
  }

  /** Whether something that was sent still waits for the device to read it. */
  get pending(): boolean {
    return (this.#stream?.writableLength ?? 0) > 0;
  }

  attach(stream: Duplex): void {
    this.detach();
    this.#stream = stream;
    const decoder = new FrameStreamDecoder({
      frame: (bytes) => this.#stream === stream && this.#frame(bytes),
      control: (bytes) => this.#stream === stream && this.#control(bytes),
    });
    stream.on('data', (chunk: Buffer) => {
      if (this.#stream !== stream) return;
      stream.cork(); // the answers to all frames of a chunk go out at once
      const intact = decoder.push(chunk);
      stream.uncork();
      if (intact) return;
      this.#counters.brokenLinks++;
      stream.destroy();
      this.#lost(stream);
    });
    stream.on('drain', () => this.#stream === stream && this.#listener.drained());
    stream.on('error', () => this.#lost(stream));
    stream.on('end', () => stream.destroy());
    stream.on('close', () => this.#lost(stream));
  }

  /** Ends the link. @returns the stream, which closes. */
  detach(): Duplex | undefined {
    const stream = this.#stream;
    if (!stream) return undefined;
    this.#lost(stream);
    return stream.destroy();
  }

  #lost(stream: Duplex): void {
    if (this.#stream !== stream) return;
    this.#stream = undefined;
    this.#guestKnown = false;
    this.#offloads = 0;
    this.#listener.lost();
  }

  /** Everything that `write` sends goes to the device at once. */
  batch(write: () => void): void {
    const stream = this.#stream;
    stream?.cork();
    write();
    stream?.uncork();
  }

  /**
   * Sends a message: completes its length, virtio and Ethernet headers. An offload's fields in the virtio header are set
   * by `offload` before.
   * @param parts what follows `head`; not copied.
   */
  send(head: Uint8Array, etherType: number, parts?: readonly Uint8Array[], partsLength = 0): void {
    const stream = this.#stream;
    if (!stream || !this.#guestKnown) {
      this.#drop('noGuest');
      return;
    }
    if (stream.writableLength >= OVERFULL) {
      this.#drop('linkFull');
      return;
    }
    head.set(this.#guestMac, Out.ETHERNET);
    this.#send(stream, head, etherType, parts, partsLength);
  }

  /** Sends a message to every station. */
  broadcast(head: Uint8Array, etherType: number): void {
    const stream = this.#stream;
    if (!stream) {
      this.#drop('noGuest');
      return;
    }
    if (stream.writableLength >= OVERFULL) {
      this.#drop('linkFull');
      return;
    }
    head.fill(0xff, Out.ETHERNET, Out.ETHERNET + 6);
    this.#send(stream, head, etherType, undefined, 0);
  }

  #send(
    stream: Duplex,
    head: Uint8Array,
    etherType: number,
    parts: readonly Uint8Array[] | undefined,
    partsLength: number,
  ): void {
    const length = head.length - LENGTH_SIZE + partsLength;
    putFrameLength(head, 0, length);
    head.set(NETWORK_MAC, Out.ETHERNET + 6);
    put16(head, Out.ETHERNET + 12, etherType);
    this.#counters.framesToGuest++;
    this.#counters.bytesToGuest += length - NET_HEADER_SIZE;
    if (!parts) {
      stream.write(head);
      return;
    }
    stream.cork();
    stream.write(head);
    for (const part of parts) stream.write(part);
    stream.uncork();
  }

  #drop(reason: 'noGuest' | 'linkFull'): void {
    this.#counters.dropped[reason]++;
  }

  #frame(bytes: Uint8Array): void {
    const counters = this.#counters;
    counters.framesFromGuest++;
    if (bytes.length < In.PAYLOAD) {
      counters.dropped.malformed++;
      return;
    }
    counters.bytesFromGuest += bytes.length - NET_HEADER_SIZE;
    if ((bytes[In.SOURCE] as number) & 1) {
      counters.dropped.malformed++; // a group address cannot be a source
      return;
    }
    this.#listener.frame(bytes);
  }

  /** Takes the source MAC of a frame that was found to be the guest's. */
  learn(bytes: Uint8Array): void {
    for (let i = 0; i < 6; i++) this.#guestMac[i] = bytes[In.SOURCE + i] as number;
    this.#guestKnown = true;
  }

  #control(bytes: Uint8Array): void {
    if (bytes[0] === ControlType.OFFLOADS && bytes.length >= 2) this.#offloads = bytes[1] as number;
    else this.#counters.dropped.malformed++;
  }
}

/** Whether a frame is for the network's own MAC. */
export function isForNetwork(bytes: Uint8Array): boolean {
  return (
    u16(bytes, In.DESTINATION) === u16(NETWORK_MAC, 0) &&
    u16(bytes, In.DESTINATION + 2) === u16(NETWORK_MAC, 2) &&
    u16(bytes, In.DESTINATION + 4) === u16(NETWORK_MAC, 4)
  );
}

/** Clears the virtio header of a message: a frame that is complete. */
export function noOffload(head: Uint8Array): void {
  head.fill(0, Out.NET_HEADER, Out.ETHERNET);
  head[Out.NET_HEADER + NetHeader.NUM_BUFFERS] = 1;
}
