import type { GuestIo } from '../../backends/guest-io.js';
import type { PortStream } from '../../backends/port-stream.js';
import type { DeviceState } from '../../bus/bus.js';
import type { StateReader } from '../../state-reader.js';
import { feature, type VirtioContext, type VirtioModel } from '../device.js';
import * as abi from '../generated/virtio.js';
import { Control } from './control.js';
import { Port } from './port.js';

const { virtio_console_config: layout } = abi;

/**
 * Descriptors of each queue. Linux fills receive queues with pages; output goes in buffers of up to 32 KiB, a splice in
 * one of 16 pages.
 */
const RECEIVE_SIZE = 16;
const TRANSMIT_SIZE = 64;

const SIZE = feature(abi.VIRTIO_CONSOLE_F_SIZE);
const MULTIPORT = feature(abi.VIRTIO_CONSOLE_F_MULTIPORT);

export interface ConsoleOptions {
  /** At least one; a port's number is its place here. */
  readonly ports: readonly PortStream[];
  readonly io: GuestIo;
}

/**
 * Console device (virtio 1.2 section 5.3): terminals (hvc) and named byte streams between host and guest. A driver that
 * does not know MULTIPORT has port 0 alone, as a terminal. Where that is all there is, MULTIPORT is not even offered:
 * the guest's console is there sooner, and its size comes in the configuration space, whose order no Linux got wrong.
 */
export class VirtioConsole implements VirtioModel {
  readonly name = 'console';
  readonly type = abi.VIRTIO_ID_CONSOLE;
  readonly queueSizes: readonly number[];
  readonly features: bigint;
  readonly #ports: readonly Port[];
  readonly #control: Control;
  #context: VirtioContext | undefined;
  /** The guest has printed at port 0. */
  #printed = false;

  constructor({ ports, io }: ConsoleOptions) {
    this.#ports = ports.map((stream) => new Port(stream, io));
    this.#control = new Control(this.#ports);
    const multiport = ports.length > 1 || !ports[0]?.console;
    this.features = SIZE | feature(abi.VIRTIO_CONSOLE_F_EMERG_WRITE) | (multiport ? MULTIPORT : 0n);
    // Section 5.3.2: the control queues come after those of port 0.
    const pairs = multiport ? ports.length + 1 : 1;
    this.queueSizes = Array.from({ length: 2 * pairs }, (_, index) => (index & 1 ? TRANSMIT_SIZE : RECEIVE_SIZE));
    ports.forEach((stream, id) => {
      stream.onReady = () => this.#ready(id);
      stream.onResize = () => this.#resized(id);
      stream.onEnd = (most) => (this.#ports[id] as Port).end(most);
    });
  }

  get malformed(): number {
    return this.#control.malformed;
  }

  readConfig(offset: number, out: Uint8Array): void {
    const bytes = new Uint8Array(layout.sizeof);
    const view = new DataView(bytes.buffer);
    const { rows, columns } = (this.#ports[0] as Port).stream.size;
    view.setUint16(layout.cols, columns, true);
    view.setUint16(layout.rows, rows, true);
    view.setUint32(layout.max_nr_ports, this.#ports.length, true);
    out.set(bytes.subarray(offset, offset + out.length));
  }

  /** Section 5.3.5.1: emerg_wr prints its low byte whatever state the device is in. */
  writeConfig(offset: number, data: Uint8Array): void {
    if (offset === layout.emerg_wr) (this.#ports[0] as Port).stream.writeByte(data[0] as number);
  }

  activate(context: VirtioContext): void {
    this.#context = context;
    const { memory, queues } = context;
    const multiport = this.#negotiated(MULTIPORT);
    for (const [id, port] of this.#ports.entries()) {
      if (id > 0 && !multiport) break;
      const first = id === 0 ? 0 : 2 * id + 2;
      const [receive, transmit] = queues.slice(first, first + 2);
      if (receive && transmit) port.activate({ memory, receive, transmit });
    }
    const [receive, transmit] = queues.slice(2, 4);
    if (!multiport) (this.#ports[0] as Port).open = true;
    else if (receive && transmit) this.#control.activate(receive, transmit);
  }

  handleQueue(index: number): void {
    if (index === 2) this.#control.send();
    else if (index === 3) this.#control.take();
    else {
      const id = index < 2 ? 0 : (index >> 1) - 1;
      const port = this.#ports[id] as Port;
      if (!(index & 1)) port.receive();
      else if (port.transmit() && id === 0) this.#noteOutput();
      this.#control.checkClosed(id);
    }
  }

  reset(): void {
    this.#context = undefined;
    this.#printed = false;
    for (const port of this.#ports) port.reset();
    this.#control.reset();
  }

  save(): DeviceState {
    const printed = this.#printed;
    const ports = this.#ports.map(({ open, sent, stream }) => ({ open, sent, ...stream.size }));
    return { printed, control: this.#control.save(), ports };
  }

  restore(state: StateReader): void {
    this.#control.restore(state.object('control'));
    this.#printed = state.boolean('printed');
    state.listOf('ports', this.#ports.length).forEach((saved, id) => {
      const port = this.#ports[id] as Port;
      // Until somebody says another: nobody has so far.
      port.stream.size = { rows: saved.number('rows', 0, 0xffff), columns: saved.number('columns', 0, 0xffff) };
      port.sent = saved.number('sent', 0, 2 ** 32);
      port.open = saved.boolean('open');
    });
  }

  #negotiated(features: bigint): boolean {
    return ((this.#context?.features ?? 0n) & features) !== 0n;
  }

  #ready(id: number): void {
    this.#ports[id]?.ready();
    this.#control.checkClosed(id);
  }

  /** Section 5.3.6: by a control message, or by the configuration space where there are none. */
  #resized(id: number): void {
    if (this.#negotiated(MULTIPORT)) this.#control.resized(id);
    else if (id === 0 && this.#negotiated(SIZE)) this.#context?.configChanged();
  }

  /** Linux reads the configuration space's size only when that changes, and then only if its console is there already. */
  #noteOutput(): void {
    if (this.#printed) return;
    this.#printed = true;
    if ((this.#ports[0] as Port).stream.size.rows > 0 && !this.#negotiated(MULTIPORT)) this.#resized(0);
  }
}
