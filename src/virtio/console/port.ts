import type { GuestIo } from '../../backends/guest-io.js';
import type { PortStream } from '../../backends/port-stream.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { Virtqueue } from '../queue.js';
import { Segments } from '../segments.js';

/** What one port moves in one direction before everything else gets its turn. */
const CHAINS_AT_ONCE = 64;
const BYTES_AT_ONCE = 1 << 20;

/** A port's two queues, while the driver is ready. */
interface PortQueues {
  readonly memory: GuestMemory;
  readonly receive: Virtqueue;
  readonly transmit: Virtqueue;
}

/** One port of a console device: moves bytes between its queues and its socket. */
export class Port {
  readonly stream: PortStream;
  readonly #io: GuestIo;
  /** There is more to do than may be done at once. */
  readonly #later: () => void;
  #queues: PortQueues | undefined;
  #part: Segments | undefined;
  #open = false;
  /** How much of the chain at the head of the transmit queue is in the socket already. */
  #sent = 0;
  /** What keeps input, or output, from getting on: the socket, or else the guest. */
  #awaitsInput = false;
  #awaitsRoom = false;
  /** Nothing waits in the transmit queue. */
  #transmitted = true;

  constructor(stream: PortStream, io: GuestIo, later: () => void) {
    this.stream = stream;
    this.#io = io;
    this.#later = later;
  }

  activate(queues: PortQueues): void {
    this.#queues = queues;
    this.#part = new Segments(queues.memory);
  }

  reset(): void {
    this.#queues = this.#part = undefined;
    this.#open = this.#awaitsInput = this.#awaitsRoom = false;
    this.#transmitted = true;
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

  /** The socket may get on. */
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

  /** What the guest wrote last, though it is at its end. @returns whether that is all. */
  drain(): boolean {
    this.#awaitsRoom = false;
    this.transmit();
    return this.#transmitted;
  }

  /** Output, as far as the socket takes it. What it does not take stays in the queue. */
  transmit(): void {
    const queue = this.#queues?.transmit;
    const part = this.#part;
    if (!queue || !part || this.#awaitsRoom) return;
    let bytes = BYTES_AT_ONCE;
    for (let chains = CHAINS_AT_ONCE; ; chains--) {
      const chain = queue.pop();
      this.#transmitted = chain === undefined;
      if (!chain) break;
      if (chains === 0 || bytes === 0) {
        queue.unpop(chain);
        this.#later();
        break;
      }
      part.cut(chain.readable, this.#sent, bytes);
      const written = part.length > 0 ? this.stream.write(this.#io, part) : 0;
      bytes -= written;
      this.#sent += written;
      if (this.#sent < chain.readable.length) {
        queue.unpop(chain);
        if (written < part.length) this.#awaitsRoom = true;
        else this.#later();
        break;
      }
      this.#sent = 0;
      queue.push(chain, 0);
    }
    queue.publish();
    this.#wait();
  }

  /** Input, while the guest has the port open and gives buffers. What it does not take stays in the socket. */
  receive(): void {
    const queue = this.#queues?.receive;
    if (!queue || !this.#open || this.#awaitsInput || this.stream.inputEnded) return;
    let bytes = BYTES_AT_ONCE;
    for (let chains = CHAINS_AT_ONCE; ; chains--) {
      const chain = queue.pop();
      if (!chain) break;
      if (chains === 0 || bytes <= 0) {
        queue.unpop(chain);
        this.#later();
        break;
      }
      const { length } = chain.writable;
      const read = length > 0 ? this.stream.read(this.#io, chain.writable) : 0;
      bytes -= read;
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
