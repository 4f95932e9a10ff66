import type { GuestIo } from '../../backends/guest-io.js';
import type { PortStream } from '../../backends/port-stream.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { Virtqueue } from '../queue.js';
import { Segments } from '../segments.js';

/** Output of one port that is written before everything else gets its turn, in bytes. */
const AT_ONCE = 1 << 20;

/** A port's two queues, while the driver is ready. */
interface PortQueues {
  readonly memory: GuestMemory;
  readonly receive: Virtqueue;
  readonly transmit: Virtqueue;
}

/**
 * One port of a console device: moves bytes between its queues and its socket. No chain is kept meanwhile: what cannot go
 * on stays at the head of its queue.
 */
export class Port {
  readonly stream: PortStream;
  readonly #io: GuestIo;
  #queues: PortQueues | undefined;
  #part: Segments | undefined;
  #open = false;
  /** How much of the chain at the head of the transmit queue is in the socket already. */
  #sent = 0;
  /** What keeps input, or output, from going on: the socket. Otherwise it is the guest. */
  #awaitsInput = false;
  #awaitsRoom = false;

  constructor(stream: PortStream, io: GuestIo) {
    this.stream = stream;
    this.#io = io;
  }

  activate(queues: PortQueues): void {
    this.#queues = queues;
    this.#part = new Segments(queues.memory);
  }

  reset(): void {
    this.#queues = this.#part = undefined;
    this.#open = this.#awaitsInput = this.#awaitsRoom = false;
    this.#sent = 0;
  }

  /** Whether the guest takes input. */
  get open(): boolean {
    return this.#open;
  }

  set open(open: boolean) {
    this.#open = open;
    this.#awaitsInput = false;
    this.receive();
    this.#wait();
  }

  /** Bytes that were sent of a chain that is still the guest's. */
  get sent(): number {
    return this.#sent;
  }

  set sent(bytes: number) {
    this.#sent = bytes;
  }

  /** The socket may be able to go on. */
  ready(): void {
    if (this.#awaitsRoom) {
      this.#awaitsRoom = false;
      this.transmit();
    }
    if (this.#awaitsInput) {
      this.#awaitsInput = false;
      this.receive();
    }
    this.#wait();
  }

  /** Takes what could not be written before the guest's end. @param most bytes; the rest is lost. */
  end(most: number): Uint8Array {
    const queue = this.#queues?.transmit;
    const rest: Uint8Array[] = [];
    let left = most;
    for (let chain = queue?.pop(); chain; chain = queue?.pop()) {
      // A guest may have changed a chain since a part of it was sent.
      const bytes = new Uint8Array(Math.max(0, Math.min(left, chain.readable.length - this.#sent)));
      chain.readable.read(this.#sent, bytes);
      rest.push(bytes);
      left -= bytes.length;
      this.#sent = 0;
    }
    return Buffer.concat(rest);
  }

  /** Output, as far as the socket takes it. @returns whether there was some. */
  transmit(): boolean {
    const queue = this.#queues?.transmit;
    const part = this.#part;
    if (!queue || !part || this.#awaitsRoom) return false;
    let left = AT_ONCE;
    let any = false;
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      const { readable } = chain;
      any = true;
      part.cut(readable, this.#sent, left);
      if (part.length > 0) {
        const written = this.stream.write(this.#io, part);
        this.#sent += written;
        left -= written;
      }
      if (this.#sent < readable.length && !this.stream.outputGone) {
        queue.unpop(chain);
        this.#awaitsRoom = true; // which a socket that is not full has at once
        break;
      }
      this.#sent = 0;
      queue.push(chain, 0);
    }
    queue.publish();
    this.#wait();
    return any;
  }

  /** Input, while the guest has the port open and gives buffers. */
  receive(): void {
    const queue = this.#queues?.receive;
    if (!queue || !this.#open || this.#awaitsInput || this.stream.inputEnded) return;
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      const { length } = chain.writable;
      const read = length > 0 ? this.stream.read(this.#io, chain.writable) : 0;
      if (read > 0 || length === 0) queue.push(chain, read);
      else queue.unpop(chain);
      if (read < length) {
        this.#awaitsInput = true;
        break;
      }
    }
    queue.publish();
    this.#wait();
  }

  #wait(): void {
    if (this.#queues) this.stream.wait(this.#awaitsInput, this.#awaitsRoom);
  }
}
