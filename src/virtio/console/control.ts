import type { StateReader } from '../../state-reader.js';
import * as abi from '../generated/virtio.js';
import type { Virtqueue } from '../queue.js';
import type { Port } from './port.js';

const { virtio_console_control: header } = abi;

/** What the guest is still to be told of a port, in the order in which it is told. */
const Pending = { add: 1, console: 2, size: 4, name: 8, open: 16 } as const;
const ALL_PENDING = 31;

/** How far the guest has come with a port. */
interface PortState {
  readonly port: Port;
  /** Bits of Pending. */
  pending: number;
  /** The guest was told that there is such a port. */
  added: boolean;
  /** The guest has it. */
  ready: boolean;
  /** The guest was told, or is to be, that the host's end is closed. */
  closed: boolean;
}

/** What of Control is saved. */
export interface ControlState {
  readonly ports: readonly Omit<PortState, 'port'>[];
}

/**
 * The control queues of a console device (virtio 1.2 section 5.3.6.2). Messages to the guest are not queued but noted, a
 * bit for each kind and port: they wait for buffers in bounded space, and a size that is told late is the last one.
 */
export class Control {
  /** Messages of the guest that made no sense, and buffers of it that were too small. */
  malformed = 0;
  readonly #ports: PortState[];
  readonly #received = new Uint8Array(header.sizeof);
  #receive: Virtqueue | undefined;
  #transmit: Virtqueue | undefined;

  constructor(ports: readonly Port[]) {
    this.#ports = ports.map((port) => ({ port, pending: 0, added: false, ready: false, closed: false }));
  }

  activate(receive: Virtqueue, transmit: Virtqueue): void {
    this.#receive = receive;
    this.#transmit = transmit;
  }

  reset(): void {
    this.#receive = this.#transmit = undefined;
    for (const state of this.#ports) {
      state.pending = 0;
      state.added = state.ready = state.closed = false;
    }
  }

  /** Handles what the guest has sent. */
  take(): void {
    const queue = this.#transmit;
    if (!queue) return;
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      const complete = chain.readable.read(0, this.#received) === header.sizeof;
      queue.push(chain, 0);
      if (!complete || !this.#handle(this.#received)) this.malformed++;
    }
    queue.publish();
    this.send();
  }

  /** Tells the guest what is noted, as far as it has buffers for it. */
  send(): void {
    const queue = this.#receive;
    if (!queue) return;
    for (const [id, state] of this.#ports.entries()) {
      while (state.pending !== 0) {
        const chain = queue.pop();
        if (!chain) break;
        const bit = state.pending & -state.pending;
        const message = this.#message(id, state, bit);
        const fits = chain.writable.length >= message.length;
        if (fits) state.pending &= ~bit;
        else this.malformed++;
        queue.push(chain, fits ? chain.writable.write(0, message) : 0);
      }
    }
    queue.publish();
  }

  /** The host's terminal at this port has another size. */
  resized(id: number): void {
    const state = this.#ports[id] as PortState;
    if (!state.ready || !state.port.stream.console) return;
    state.pending |= Pending.size;
    this.send();
  }

  /** Tells the guest when the host's end of a port is closed. Nobody reads what it prints on a terminal then: no matter. */
  checkClosed(id: number): void {
    const state = this.#ports[id] as PortState;
    if (!state.ready || state.closed || state.port.stream.console || !state.port.stream.closed) return;
    state.closed = true;
    state.pending |= Pending.open;
    this.send();
  }

  save(): ControlState {
    return { ports: this.#ports.map(({ pending, added, ready, closed }) => ({ pending, added, ready, closed })) };
  }

  /** A port's host end is another one now: the guest hears of it where it is not as open as that of before. */
  restore(saved: StateReader): void {
    saved.listOf('ports', this.#ports.length).forEach((port, id) => {
      const state = this.#ports[id] as PortState;
      state.pending = port.number('pending', 0, ALL_PENDING);
      state.added = port.boolean('added');
      state.ready = port.boolean('ready');
      state.closed = state.port.stream.closed;
      if (port.boolean('closed') !== state.closed && state.ready) state.pending |= Pending.open;
    });
  }

  /** @returns whether the message makes sense. */
  #handle(bytes: Uint8Array): boolean {
    const view = new DataView(bytes.buffer);
    const event = view.getUint16(header.event, true);
    const value = view.getUint16(header.value, true);
    if (value > 1) return false;
    if (event === abi.VIRTIO_CONSOLE_DEVICE_READY) {
      if (value === 1) this.#deviceReady();
      return true;
    }
    const id = view.getUint32(header.id, true);
    const state = this.#ports[id];
    if (!state?.added) return false;
    if (event === abi.VIRTIO_CONSOLE_PORT_READY) {
      if (value === 1) this.#portReady(state);
      return true;
    }
    if (event !== abi.VIRTIO_CONSOLE_PORT_OPEN) return false;
    if (state.port.open !== (value === 1)) state.port.open = value === 1;
    this.checkClosed(id);
    return true;
  }

  #deviceReady(): void {
    for (const state of this.#ports) {
      // 5.3.6.2.1: a port is not added twice.
      if (!state.added) state.pending |= Pending.add;
      state.added = true;
    }
  }

  #portReady(state: PortState): void {
    if (state.ready) return;
    const { stream } = state.port;
    state.ready = true;
    state.closed = stream.closed;
    state.pending |= Pending.name | Pending.open;
    if (!stream.console) return;
    state.pending |= Pending.console;
    if (stream.size.rows > 0) state.pending |= Pending.size;
  }

  #message(id: number, { port: { stream }, closed }: PortState, bit: number): Uint8Array {
    switch (bit) {
      case Pending.add:
        return encode(id, abi.VIRTIO_CONSOLE_PORT_ADD, 0);
      case Pending.console:
        return encode(id, abi.VIRTIO_CONSOLE_CONSOLE_PORT, 1);
      case Pending.size: {
        // As the specification has it. Linux took the rows first until 2025, and some kernels still do.
        const size = new Uint8Array(new Uint16Array([stream.size.columns, stream.size.rows]).buffer);
        return encode(id, abi.VIRTIO_CONSOLE_RESIZE, 0, size);
      }
      case Pending.name:
        return encode(id, abi.VIRTIO_CONSOLE_PORT_NAME, 1, Buffer.from(stream.name));
      default:
        return encode(id, abi.VIRTIO_CONSOLE_PORT_OPEN, closed ? 0 : 1);
    }
  }
}

function encode(id: number, event: number, value: number, rest = new Uint8Array()): Uint8Array {
  const message = new Uint8Array(header.sizeof + rest.length);
  const view = new DataView(message.buffer);
  view.setUint32(header.id, id, true);
  view.setUint16(header.event, event, true);
  view.setUint16(header.value, value, true);
  message.set(rest, header.sizeof);
  return message;
}
