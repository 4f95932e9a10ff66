import { PortStream } from '#dist/backends/port-stream.js';
import { addon } from '#dist/kvm/addon.js';
import { VirtioConsole } from '#dist/virtio/console/console.js';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import type { Random } from '../../kvm/assist/random.js';
import { ManualEvents, ManualIo, PerMemory, sockets } from '../host.js';
import type { FuzzMachine } from '../machine.js';
import type { Request, Subject, Target } from '../target.js';

const CONTROL_RECEIVE = 2;
const CONTROL_TRANSMIT = 3;
const NOISE = Uint8Array.from({ length: 70_000 }, (_, i) => (i * 37 + (i >> 8)) & 0xff);
const { virtio_console_control: control } = abi;
const MULTIPORT = feature(abi.VIRTIO_CONSOLE_F_MULTIPORT);
const EVENTS = [abi.VIRTIO_CONSOLE_DEVICE_READY, abi.VIRTIO_CONSOLE_PORT_READY, abi.VIRTIO_CONSOLE_PORT_OPEN];
const chunk = new Uint8Array(65_536);

/** The socket of one port, both ends. */
interface Port {
  readonly stream: PortStream;
  readonly device: number;
  readonly host: number;
  closed: boolean;
}

class ConsoleSubject implements Subject {
  device: VirtioConsole;
  readonly writableConfig = [abi.virtio_console_config.emerg_wr];
  readonly #ports: Port[];
  readonly #events = new ManualEvents();
  readonly #io: ManualIo;
  #machine: FuzzMachine | undefined;
  readonly #controls: number;
  /** The host reads hardly anything, and the guest writes much. */
  readonly #clogged: boolean;
  /** How far the guest is with the messages that open every port. */
  #opened = 0;

  constructor(random: Random, io: ManualIo, controls: number) {
    this.#io = io;
    this.#controls = controls;
    this.#clogged = random.chance(20);
    this.#ports = Array.from({ length: 1 + random.below(4) }, (_, id) => {
      const { device, host } = sockets(this.#clogged);
      const name = random.pick(['a', `port${id}`, 'x'.repeat(100)]);
      return {
        stream: new PortStream(name, random.chance(50), device, this.#events.events),
        device,
        host,
        closed: false,
      };
    });
    this.device = this.#make();
  }

  renew(): VirtioConsole {
    this.device = this.#make();
    return this.device;
  }

  #make(): VirtioConsole {
    return new VirtioConsole({ ports: this.#ports.map(({ stream }) => stream), io: this.#io });
  }

  attach(machine: FuzzMachine): void {
    this.#machine = machine;
    this.#io.onMemory = machine.checkIo;
    machine.onActivate = () => {
      this.#opened = 0;
    };
  }

  queue(random: Random): number {
    const { length } = this.device.queueSizes;
    const controls = Math.max(this.#controls, this.#opened <= 2 * this.#ports.length ? 60 : 0);
    if (length > 2 && random.chance(controls)) return random.chance(60) ? CONTROL_TRANSMIT : CONTROL_RECEIVE;
    return random.below(length);
  }

  request(random: Random, queue: number): Request {
    const input = queue % 2 === 0;
    if (queue === CONTROL_TRANSMIT) return { out: this.#message(random), in: random.chance(97) ? 0 : 8 };
    const length = random.chance(this.#clogged ? 30 : 80) ? random.below(300) : random.below(NOISE.length);
    if (queue === CONTROL_RECEIVE)
      return { out: new Uint8Array(), in: random.chance(80) ? 8 + random.below(120) : length };
    // Both directions now and then, which a driver never means.
    const other = random.chance(97) ? 0 : 10;
    return { out: NOISE.subarray(0, input ? other : length), in: input ? length : other };
  }

  hostEvent(random: Random): string {
    const port = random.pick(this.#ports);
    const dice = random.below(100);
    if (dice < 35) {
      if (!port.closed) addon.write(port.host, NOISE, 0, 1 + random.below(random.chance(90) ? 500 : NOISE.length - 1));
      return this.#events.fire(random) ? 'input, an event' : 'input';
    }
    if (dice < 55 && !(this.#clogged && random.chance(90))) {
      const count = port.closed ? 0 : addon.read(port.host, chunk, 0, 1 + random.below(chunk.length));
      return `the host reads ${count} bytes`;
    }
    if (dice < 65) {
      port.stream.resize({ rows: random.below(0x1_0000), columns: random.pick([0, 80, 0xffff]) });
      return 'another size';
    }
    if (dice < 68 && !port.closed) {
      addon.close(port.host);
      port.closed = true;
      return 'the host closes a port';
    }
    return this.#events.fire(random) ? 'an event' : 'nothing';
  }

  settle(): boolean {
    this.#fire();
    return this.#ports.some((port) => this.#take(port).length > 0);
  }

  /** Output, and control messages, where there are any. */
  serves(queue: number): boolean {
    const features = BigInt(`0x${this.#machine?.driver.transport.save().driverFeatures ?? 0}`);
    return queue % 2 === 1 && (queue < 2 || (features & MULTIPORT) !== 0n);
  }

  probe({ driver }: FuzzMachine): void {
    driver.initialize({ queueSizes: this.device.queueSizes.map(() => 8), features: 0n });
    const [port] = this.#ports as [Port];
    const [receive, transmit] = driver.queues;
    const text = Buffer.from('a well-behaved guest');
    this.#take(port);
    transmit?.send([text]);
    this.#fire();
    if (transmit?.completions().length !== 1) throw new Error('output was not taken');
    if (port.closed) return;
    if (!this.#take(port).subarray(-text.length).equals(text)) throw new Error('output did not come out');
    addon.write(port.host, text, 0, text.length);
    receive?.send([100]);
    this.#fire();
    const [done] = receive?.completions() ?? [];
    if (!done || done.written === 0 || done.written > 100) throw new Error('input did not come in');
    // What is left when the machine ends.
    if (this.#clogged) for (let n = 0; n < 3; n++) transmit?.send([NOISE.subarray(0, 9000)]);
  }

  end(): void {
    for (const { stream, device, host, closed } of this.#ports) {
      stream.end();
      this.#events.events.remove(device);
      addon.close(device);
      if (!closed) addon.close(host);
    }
  }

  /** A control message, nearly always a good one. */
  #message(random: Random): Uint8Array {
    const bytes = new Uint8Array(random.chance(95) ? control.sizeof : random.below(20));
    if (bytes.length < control.sizeof) return bytes;
    const view = new DataView(bytes.buffer);
    const ports = this.#ports.length;
    if (this.#opened <= 2 * ports && random.chance(80)) {
      const step = this.#opened++;
      const event = EVENTS[step === 0 ? 0 : step <= ports ? 1 : 2] as number;
      view.setUint32(control.id, step === 0 ? 0 : (step - 1) % ports, true);
      view.setUint16(control.event, event, true);
      view.setUint16(control.value, 1, true);
      return bytes;
    }
    view.setUint32(control.id, random.chance(93) ? random.below(ports) : random.u32(), true);
    view.setUint16(control.event, random.chance(93) ? random.pick(EVENTS) : random.below(12), true);
    view.setUint16(control.value, random.chance(90) ? 1 : random.below(4), true);
    return bytes;
  }

  #fire(): void {
    for (let n = 0; n < 3 * this.#ports.length && this.#events.fire(); n++);
  }

  /** All that waits on the host's end. */
  #take({ host, closed }: Port): Buffer {
    const parts: Buffer[] = [];
    for (let count = closed ? 0 : 1; count > 0; ) {
      this.#fire();
      count = addon.read(host, chunk, 0, chunk.length);
      if (count > 0) parts.push(Buffer.from(chunk.subarray(0, count)));
    }
    return Buffer.concat(parts);
  }
}

function target(name: string, controls: number): Target {
  const io = new PerMemory((memory) => new ManualIo(memory));
  return {
    name,
    // Every queue is looked at when its driver is ready, each with chains as long as they may be.
    limits: { accesses: 10 * 64 * 64 * 8 + 20_000, bytes: 1 << 20 },
    subject: (random, memory) => new ConsoleSubject(random, io.get(memory), controls),
    dispose: () => io.dispose(),
  };
}

export const consolePort = target('console-port', 25);
export const consoleControl = target('console-control', 85);
