import koffi from 'koffi';
import { GuestIo } from '#dist/backends/guest-io.js';
import { PortStream } from '#dist/backends/port-stream.js';
import { addon } from '#dist/kvm/addon.js';
import { EPOLLIN } from '#dist/kvm/generated/abi.js';
import { FdEvents } from '#dist/machine/fd-events.js';
import { VirtioConsole } from '#dist/virtio/console/console.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { type DriverOptions, MockDriver, type MockQueue, mockMemory } from '../../support/virtio/mock-driver.js';

const ONE = new Uint8Array(new BigUint64Array([1n]).buffer);
const { virtio_console_control: header } = abi;
const shutdown = koffi.load('libc.so.6').func('int shutdown(int fd, int how)');
const SHUT_WR = 1;

/** Feature sets of drivers. */
export const NO_MULTIPORT = ~(1n << BigInt(abi.VIRTIO_CONSOLE_F_MULTIPORT));

export interface Message {
  readonly id: number;
  readonly event: number;
  readonly value: number;
  readonly rest?: Uint8Array;
}

export function encode({ id, event, value, rest = new Uint8Array() }: Message): Uint8Array {
  const bytes = new Uint8Array(header.sizeof + rest.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(header.id, id, true);
  view.setUint16(header.event, event, true);
  view.setUint16(header.value, value, true);
  bytes.set(rest, header.sizeof);
  return bytes;
}

function decode(bytes: Uint8Array): Message {
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const message = {
    id: view.getUint32(header.id, true),
    event: view.getUint16(header.event, true),
    value: view.getUint16(header.value, true),
  };
  return bytes.length > header.sizeof ? { ...message, rest: bytes.subarray(header.sizeof) } : message;
}

/** The host's end of a port, with the raw socket: what it sees is not buffered anywhere else. */
export class HostEnd {
  readonly fd: number;
  #closed = false;

  constructor(fd: number) {
    this.fd = fd;
  }

  /** All that has come so far, or at most so much of it. */
  read(most = Number.POSITIVE_INFINITY): Buffer {
    const parts: Buffer[] = [];
    for (let left = most; left > 0; ) {
      const part = Buffer.alloc(Math.min(65536, left));
      const count = addon.read(this.fd, part, 0, part.length);
      if (count <= 0) break;
      parts.push(part.subarray(0, count));
      left -= count;
    }
    return Buffer.concat(parts);
  }

  /** @returns how much of it the socket took. */
  write(data: Uint8Array | string): number {
    const bytes = Buffer.from(data);
    let done = 0;
    while (done < bytes.length) {
      const count = addon.write(this.fd, bytes, done, bytes.length - done);
      if (count <= 0) break;
      done += count;
    }
    return done;
  }

  /** Says that no more will be written. */
  endWriting(): void {
    shutdown(this.fd, SHUT_WR);
  }

  close(): void {
    if (!this.#closed) addon.close(this.fd);
    this.#closed = true;
  }
}

/** A machine's thread without a vCPU: descriptors, guest RAM, and a console device with these ports on them. */
export class ConsoleRig implements Disposable {
  readonly #run = new addon.RunHost();
  readonly events = new FdEvents(this.#run);
  streams: readonly PortStream[] = [];
  hosts: readonly HostEnd[] = [];
  device!: VirtioConsole;
  driver!: MockDriver;
  readonly #memory: ReturnType<typeof mockMemory>['memory'];
  readonly #mapping: ReturnType<typeof mockMemory>['mapping'];
  readonly io: GuestIo;
  readonly #doorbell = addon.eventfd(0);
  readonly #ring: (events: number) => void;
  readonly #descriptors: number[] = [];
  #rung = false;
  #controlBuffers = 0;
  /** Events that were handled. */
  handled = 0;

  /** @param ports names; those that begin with `hvc` are consoles. */
  constructor(...ports: readonly string[]) {
    const { mapping, memory } = mockMemory(64 << 20);
    this.#mapping = mapping;
    this.#memory = memory;
    this.io = new GuestIo([[0, mapping]], memory, this.events);
    this.#connect(ports);
    this.powerOn();
    this.#ring = this.events.add(this.#doorbell, () => {
      addon.read(this.#doorbell, new Uint8Array(8), 0, 8);
      this.#rung = true;
    });
  }

  /** With a driver that is ready, without control messages yet. */
  static ready(ports: readonly string[], options: DriverOptions = {}): ConsoleRig {
    const rig = new ConsoleRig(...ports);
    rig.driver.initialize(options);
    return rig;
  }

  /** With a driver that has gone through all of section 5.3.5 as Linux does, every port open. */
  static open(...ports: readonly string[]): ConsoleRig {
    const rig = ConsoleRig.ready(ports);
    rig.setUpPorts();
    return rig;
  }

  setUpPorts(): void {
    this.sendControl({ id: 0xffffffff, event: abi.VIRTIO_CONSOLE_DEVICE_READY, value: 1 });
    this.control();
    for (const id of this.hosts.keys()) {
      this.sendControl({ id, event: abi.VIRTIO_CONSOLE_PORT_READY, value: 1 });
      this.setOpen(id, true);
      this.control();
    }
  }

  setOpen(id: number, open: boolean): void {
    this.sendControl({ id, event: abi.VIRTIO_CONSOLE_PORT_OPEN, value: open ? 1 : 0 });
  }

  host(id: number): HostEnd {
    return this.hosts[id] as HostEnd;
  }

  receiveq(id: number): MockQueue {
    return this.driver.queues[id === 0 ? 0 : 2 * id + 2] as MockQueue;
  }

  transmitq(id: number): MockQueue {
    return this.driver.queues[id === 0 ? 1 : 2 * id + 3] as MockQueue;
  }

  sendControl(message: Message | Uint8Array): void {
    const queue = this.driver.queues[3] as MockQueue;
    queue.request([message instanceof Uint8Array ? message : encode(message)]);
  }

  /** Gives the control receive queue buffers until it stops filling them. @returns the messages in them. */
  control(): Message[] {
    const queue = this.driver.queues[2] as MockQueue;
    const messages: Message[] = [];
    for (;;) {
      if (this.#controlBuffers === 0) {
        queue.add([4096]);
        this.#controlBuffers++;
      }
      queue.notify();
      const done = queue.completions();
      if (done.length === 0) return messages;
      this.#controlBuffers -= done.length;
      messages.push(...done.map(({ data, written }) => decode(data.subarray(0, written))));
    }
  }

  /** A new device on the sockets that there are, as the machine's reset makes it. */
  powerOn(): void {
    this.device = new VirtioConsole({ ports: this.streams, io: this.io });
    this.driver = new MockDriver(this.device, this.#memory);
    this.#controlBuffers = 0;
  }

  /** The device goes on as another, whose ports have other ends on the host. @returns what was saved. */
  move() {
    for (const host of this.hosts) host.close();
    this.#connect(this.streams.map(({ name }) => name));
    this.device = new VirtioConsole({ ports: this.streams, io: this.io });
    return this.driver.move(this.device);
  }

  #connect(ports: readonly string[]): void {
    const pairs = ports.map(() => addon.socketpair() as [number, number]);
    this.streams = pairs.map(([, there], i) => {
      const name = ports[i] as string;
      this.#descriptors.push(there);
      return new PortStream(name, name.startsWith('hvc'), there, this.events);
    });
    this.hosts = pairs.map(([here]) => new HostEnd(here));
  }

  /** The driver starts anew. */
  reinitialize(options: DriverOptions = {}): void {
    this.driver.initialize(options);
    this.#controlBuffers = 0;
  }

  /** Handles what is ready now. */
  pump(): void {
    this.#rung = false;
    this.#ring(EPOLLIN);
    addon.write(this.#doorbell, ONE, 0, ONE.length);
    while (!this.#rung) {
      this.events.dispatch(this.#run.next() & 0xffff);
      this.handled++;
    }
    this.handled--; // the doorbell's own
  }

  /** Handles events until something is so. */
  async until(what: () => boolean): Promise<void> {
    for (const end = Date.now() + 60_000; !what(); ) {
      if (Date.now() > end) throw new Error(`it never came to be that ${what}`);
      this.pump();
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  /** Handles events for long enough that what could happen has. */
  async settle(): Promise<void> {
    for (let i = 0; i < 20; i++) {
      this.pump();
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
  }

  [Symbol.dispose](): void {
    this.io[Symbol.dispose]();
    this.#run.close();
    for (const host of this.hosts) host.close();
    for (const fd of [...this.#descriptors, this.#doorbell]) addon.close(fd);
    this.#mapping.unmap();
  }
}
