import type { Duplex } from 'node:stream';
import { FrameStreamDecoder } from '../frame-stream-format.js';
import {
  decodeHeader,
  decodeNotice,
  encodeHeader,
  encodeNotice,
  HEADER_SIZE,
  MAX_PACKET,
  NOTICE_SIZE,
  type PacketHeader,
} from './packet.js';

/** Bytes waiting for the device at which data is held back. */
const FULL = 256 * 1024;
/**
 * Bytes waiting for the device at which nothing is read from it: replies wait here for a guest that does not take them
 * (virtio 1.2 section 5.10.6.1). Far above FULL, so that data alone cannot stop a guest that has replies to send.
 */
const OVERFULL = 1024 * 1024;

export interface LinkListener {
  /** @param payload a view; it does not change any more. */
  packet(header: PacketHeader, payload: Uint8Array): void;
  /** The guest's driver came or went: nothing is left of its connections. */
  driver(up: boolean): void;
  /** The link was full and is not any more. */
  drained(): void;
  /** The device is gone, and all that it sent was told. */
  closed(): void;
}

/** The main thread's end of a socket device's channel. */
export class VsockLink {
  readonly #cid: number;
  readonly #stream: Duplex;

  constructor(cid: number, stream: Duplex, listener: LinkListener) {
    this.#cid = cid;
    this.#stream = stream;
    const message = (bytes: Uint8Array) => {
      if (bytes.length === NOTICE_SIZE) {
        const notice = decodeNotice(bytes);
        listener.driver(notice.up);
        stream.write(encodeNotice(notice)); // after all that was sent to the driver of before
      } else if (bytes.length >= HEADER_SIZE) {
        listener.packet(decodeHeader(bytes), bytes.subarray(HEADER_SIZE));
      }
    };
    const decoder = new FrameStreamDecoder({ frame: message, control: () => {} }, undefined, MAX_PACKET);
    stream.on('data', (chunk: Buffer) => {
      stream.cork(); // the answers to all packets of a chunk go out at once
      const intact = decoder.push(chunk);
      stream.uncork();
      if (!intact) stream.destroy();
      else if (stream.writableLength >= OVERFULL) stream.pause();
    });
    stream.on('drain', () => {
      stream.resume();
      listener.drained();
    });
    stream.on('error', () => {}); // its owner knows why
    stream.on('close', () => listener.closed());
  }

  /** Whether data should wait for `drained`. */
  get full(): boolean {
    return this.#stream.writableNeedDrain && this.#stream.writableLength >= FULL;
  }

  /** Sends a packet. @param sent called when the payload is not needed any more. */
  send(header: PacketHeader, payload?: Uint8Array, sent?: () => void): void {
    const stream = this.#stream;
    if (stream.destroyed) return;
    const head = encodeHeader(this.#cid, header, payload?.length ?? 0);
    if (!payload) {
      stream.write(head);
      return;
    }
    stream.cork();
    stream.write(head);
    stream.write(payload, sent && (() => sent()));
    stream.uncork();
  }
}
