import { Duplex } from 'node:stream';
import { UsageError } from '../errors.js';
import {
  FrameStreamDecoder,
  LENGTH_SIZE,
  MAX_FRAME_LENGTH,
  NET_HEADER_SIZE,
  NetHeader,
  putFrameLength,
} from './frame-stream-format.js';

const ETHERNET_HEADER = 14;
/** The longest frame, in bytes. */
const MAX_FRAME = MAX_FRAME_LENGTH - NET_HEADER_SIZE;

/**
 * The host's end of a guest's network card, as a stream of Ethernet frames without check sequence: an object (Uint8Array)
 * each, complete, never segments to be cut or checksums to be filled in. Frames that nobody reads wait in the guest.
 */
export class FramePort extends Duplex {
  readonly #link: Duplex;

  /** @param link to the device; owned. */
  constructor(link: Duplex) {
    super({ objectMode: true, allowHalfOpen: false });
    this.#link = link;
    const decoder = new FrameStreamDecoder({
      frame: (bytes) => {
        if (bytes.length < NET_HEADER_SIZE + ETHERNET_HEADER) return;
        // A copy: a view would keep the whole chunk alive.
        if (!this.push(new Uint8Array(bytes.subarray(NET_HEADER_SIZE)))) link.pause();
      },
      control: () => {}, // what the guest accepts: nothing is ever left to it here
    });
    link.on('data', (chunk: Buffer) => {
      if (!decoder.push(chunk)) link.destroy();
    });
    link.on('close', () => {
      this.push(null);
      this.end();
    });
    link.on('error', () => {}); // 'close' follows
    link.pause();
  }

  override _read(): void {
    this.#link.resume();
  }

  override _write(frame: unknown, _encoding: string, done: (error?: Error) => void): void {
    if (!(frame instanceof Uint8Array) || frame.length < ETHERNET_HEADER || frame.length > MAX_FRAME) {
      done(new UsageError(`a frame must be a Uint8Array of ${ETHERNET_HEADER} to ${MAX_FRAME} bytes`));
      return;
    }
    const head = new Uint8Array(LENGTH_SIZE + NET_HEADER_SIZE);
    putFrameLength(head, 0, NET_HEADER_SIZE + frame.length);
    head[LENGTH_SIZE + NetHeader.NUM_BUFFERS] = 1;
    this.#link.cork();
    this.#link.write(head);
    // A machine that has ended takes nothing any more: that is not the writer's error.
    this.#link.write(frame, () => done());
    this.#link.uncork();
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    this.#link.destroy();
    done(error);
  }
}
