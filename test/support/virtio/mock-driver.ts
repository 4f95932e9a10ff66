import { addon } from '#dist/kvm/addon.js';
import { MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE } from '#dist/kvm/generated/abi.js';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { StateReader } from '#dist/state-reader.js';
import { feature, type VirtioModel } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { type TransportState, VirtioMmio } from '#dist/virtio/transport/mmio.js';

const ACKNOWLEDGED = abi.VIRTIO_CONFIG_S_ACKNOWLEDGE | abi.VIRTIO_CONFIG_S_DRIVER;

/** One buffer of a request: bytes that the device reads, or how many it may write. */
export type Buffer = Uint8Array | number;

export interface Completion {
  readonly head: number;
  /** What the device says it wrote. */
  readonly written: number;
  /** The bytes of the writable buffers, joined. */
  readonly data: Uint8Array;
}

export interface DriverOptions {
  /** Features to accept of those offered; all by default. VERSION_1 is always accepted. */
  readonly features?: bigint;
  /** Sizes of the queues; the device's maximum by default. */
  readonly queueSizes?: readonly number[];
  /** Guest RAM in bytes. */
  readonly memorySize?: number;
}

/** Guest RAM of a mock machine: a real mapping, so that native I/O works on it. */
export function mockMemory(size = 8 << 20) {
  const mapping = new addon.Mapping(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return { mapping, memory: new GuestMemory([{ gpa: 0, buffer: mapping.buffer }]) };
}

function registerBytes() {
  const bytes = new Uint8Array(4);
  return { bytes, view: new DataView(bytes.buffer) };
}

/** The guest's side of one virtio device over MMIO: negotiates, sets up queues, makes requests. */
export class MockDriver {
  device!: VirtioModel;
  readonly memory: GuestMemory;
  transport!: VirtioMmio;
  /** What the device's queues were ended for. */
  readonly broken: string[] = [];
  /** Level of the interrupt line, and how often it rose. */
  level = false;
  interrupts = 0;
  queues: MockQueue[] = [];
  /** The negotiated features. */
  features = 0n;
  #next: number;
  readonly #deviceMemory: GuestMemory;
  readonly #register = registerBytes();

  /**
   * @param deviceMemory the device's view of the memory, where it is to be another than the driver's.
   * @param from where the driver puts its structures.
   */
  constructor(
    device: VirtioModel,
    memory: GuestMemory = mockMemory().memory,
    { deviceMemory = memory, from = 0x10_0000 } = {},
  ) {
    this.memory = memory;
    this.#next = from;
    this.#deviceMemory = deviceMemory;
    this.plug(device);
  }

  /** Another device in its place, as after power-on, whose interrupt line is low. */
  plug(device: VirtioModel): void {
    this.device = device;
    this.level = false;
    this.transport = new VirtioMmio(device, {
      memory: this.#deviceMemory,
      interrupt: {
        set: (level) => {
          if (level === this.level) throw new Error('the interrupt line was set to the level it has');
          this.level = level;
          if (level) this.interrupts++;
        },
      },
      broken: (what) => this.broken.push(what),
    });
  }

  /** As plug(), but the device goes on where that of before is, by way of JSON. @returns what was saved. */
  move(device: VirtioModel): TransportState {
    const state = JSON.parse(JSON.stringify(this.transport.save()));
    this.plug(device);
    this.transport.restore(new StateReader(state, 'device'));
    return state;
  }

  /** A driver that is ready. */
  static ready(device: VirtioModel, options: DriverOptions = {}, memory?: GuestMemory): MockDriver {
    const driver = new MockDriver(device, memory);
    driver.initialize(options);
    return driver;
  }

  read32(register: number): number {
    const { bytes, view } = this.#register;
    view.setUint32(0, 0xffff_ffff);
    this.transport.read(register, bytes);
    return view.getUint32(0, true);
  }

  write32(register: number, value: number): void {
    const { bytes, view } = this.#register;
    view.setUint32(0, value, true);
    this.transport.write(register, bytes);
  }

  get status(): number {
    return this.read32(abi.VIRTIO_MMIO_STATUS);
  }

  set status(value: number) {
    this.write32(abi.VIRTIO_MMIO_STATUS, value);
  }

  get offered(): bigint {
    this.write32(abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    const low = this.read32(abi.VIRTIO_MMIO_DEVICE_FEATURES);
    this.write32(abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    return (BigInt(this.read32(abi.VIRTIO_MMIO_DEVICE_FEATURES)) << 32n) | BigInt(low);
  }

  /** As many words as there are, but at least the two that every driver writes. */
  writeFeatures(features: bigint): void {
    for (let word = 0; word < 2 || features >> BigInt(32 * word); word++) {
      this.write32(abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
      this.write32(abi.VIRTIO_MMIO_DRIVER_FEATURES, Number((features >> BigInt(32 * word)) & 0xffff_ffffn));
    }
  }

  /** Section 3.1.1, all steps. */
  initialize({ features = ~0n, queueSizes }: DriverOptions = {}): void {
    this.features = (features | feature(abi.VIRTIO_F_VERSION_1)) & this.offered;
    this.negotiate(this.features);
    if (!(this.status & abi.VIRTIO_CONFIG_S_FEATURES_OK)) throw new Error('the device refused its own features');
    this.queues = this.device.queueSizes.map((size, index) => this.setUpQueue(index, queueSizes?.[index] ?? size));
    this.status = this.status | abi.VIRTIO_CONFIG_S_DRIVER_OK;
  }

  /** Steps 1 to 6 of section 3.1.1: before the queues. */
  negotiate(features = this.offered): void {
    this.status = 0;
    this.status = ACKNOWLEDGED;
    this.writeFeatures(features);
    this.status = ACKNOWLEDGED | abi.VIRTIO_CONFIG_S_FEATURES_OK;
  }

  setUpQueue(index: number, size: number): MockQueue {
    const queue = new MockQueue(this, index, size);
    this.write32(abi.VIRTIO_MMIO_QUEUE_SEL, index);
    this.write32(abi.VIRTIO_MMIO_QUEUE_NUM, size);
    for (const [register, gpa] of [
      [abi.VIRTIO_MMIO_QUEUE_DESC_LOW, queue.descriptors],
      [abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.available],
      [abi.VIRTIO_MMIO_QUEUE_USED_LOW, queue.used],
    ] as const) {
      this.write32(register, gpa % 2 ** 32);
      this.write32(register + 4, Math.floor(gpa / 2 ** 32));
    }
    this.write32(abi.VIRTIO_MMIO_QUEUE_READY, 1);
    return queue;
  }

  readConfig(offset: number, length: number): Uint8Array {
    const data = new Uint8Array(length).fill(0xff);
    this.transport.read(abi.VIRTIO_MMIO_CONFIG + offset, data);
    return data;
  }

  writeConfig(offset: number, data: Uint8Array): void {
    this.transport.write(abi.VIRTIO_MMIO_CONFIG + offset, data);
  }

  /** What a driver's handler does with an interrupt. @returns the interrupt status it found. */
  acknowledge(): number {
    const status = this.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS);
    this.write32(abi.VIRTIO_MMIO_INTERRUPT_ACK, status);
    return status;
  }

  /** Guest RAM for a structure. Never given back: a test's machine is short-lived. */
  allocate(length: number, alignment = 16): number {
    const gpa = Math.ceil(this.#next / alignment) * alignment;
    this.#next = gpa + length;
    return gpa;
  }
}

/** A split virtqueue as its driver sees it. */
export class MockQueue {
  readonly index: number;
  readonly size: number;
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  readonly driver: MockDriver;
  #nextDescriptor = 0;
  #nextAvailable = 0;
  #nextUsed = 0;
  readonly #writable = new Map<number, { gpa: number; length: number }[]>();

  constructor(driver: MockDriver, index: number, size: number) {
    this.driver = driver;
    this.index = index;
    this.size = size;
    this.descriptors = driver.allocate(16 * size, 16);
    this.available = driver.allocate(6 + 2 * size, 2);
    this.used = driver.allocate(6 + 8 * size, 4);
    driver.memory.zero(this.descriptors, 16 * size);
    driver.memory.zero(this.available, 6 + 2 * size);
    driver.memory.zero(this.used, 6 + 8 * size);
  }

  writeDescriptor(table: number, index: number, gpa: number, length: number, flags: number, next: number): void {
    const { memory } = this.driver;
    memory.writeU64(table + 16 * index, BigInt(gpa));
    memory.writeU32(table + 16 * index + 8, length);
    memory.writeU16(table + 16 * index + 12, flags);
    memory.writeU16(table + 16 * index + 14, next);
  }

  /** Makes a request available without notifying. @returns its head. */
  add(buffers: readonly Buffer[], { indirect = false } = {}): number {
    const { driver } = this;
    const pieces = buffers.map((buffer) => {
      const length = typeof buffer === 'number' ? buffer : buffer.length;
      const gpa = driver.allocate(length);
      if (typeof buffer !== 'number') driver.memory.write(gpa, buffer);
      return { gpa, length, flags: typeof buffer === 'number' ? abi.VRING_DESC_F_WRITE : 0 };
    });
    const head = this.#nextDescriptor % this.size;
    const table = indirect ? driver.allocate(16 * pieces.length) : this.descriptors;
    pieces.forEach(({ gpa, length, flags }, i) => {
      const at = indirect ? i : (this.#nextDescriptor + i) % this.size;
      const last = i === pieces.length - 1;
      const next = indirect ? i + 1 : (this.#nextDescriptor + i + 1) % this.size;
      this.writeDescriptor(table, at, gpa, length, flags | (last ? 0 : abi.VRING_DESC_F_NEXT), last ? 0 : next);
    });
    if (indirect) this.writeDescriptor(this.descriptors, head, table, 16 * pieces.length, abi.VRING_DESC_F_INDIRECT, 0);
    this.#nextDescriptor += indirect ? 1 : pieces.length;
    this.#writable.set(
      head,
      pieces.filter(({ flags }) => flags !== 0),
    );
    this.makeAvailable(head);
    return head;
  }

  makeAvailable(head: number): void {
    const { memory } = this.driver;
    memory.writeU16(this.available + 4 + 2 * (this.#nextAvailable % this.size), head);
    this.#nextAvailable = (this.#nextAvailable + 1) & 0xffff;
    memory.writeU16(this.available + 2, this.#nextAvailable);
  }

  notify(): void {
    this.driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, this.index);
  }

  /** Makes a request and notifies. @returns its head. */
  send(buffers: readonly Buffer[], options: { indirect?: boolean } = {}): number {
    const head = this.add(buffers, options);
    this.notify();
    return head;
  }

  /** used.idx. */
  get usedIndex(): number {
    return this.driver.memory.readU16(this.used + 2);
  }

  /** What the device asks to be notified at (EVENT_IDX). */
  get availEvent(): number {
    return this.driver.memory.readU16(this.used + 4 + 8 * this.size);
  }

  /** The driver asks to be interrupted at this used index (EVENT_IDX). */
  set usedEvent(index: number) {
    this.driver.memory.writeU16(this.available + 4 + 2 * this.size, index);
  }

  set availFlags(flags: number) {
    this.driver.memory.writeU16(this.available, flags);
  }

  /** What has been used since the last time. */
  completions(): Completion[] {
    const { memory } = this.driver;
    const done: Completion[] = [];
    for (; this.#nextUsed !== this.usedIndex; this.#nextUsed = (this.#nextUsed + 1) & 0xffff) {
      const entry = this.used + 4 + 8 * (this.#nextUsed % this.size);
      const head = memory.readU32(entry);
      const written = memory.readU32(entry + 4);
      const parts = this.#writable.get(head) ?? [];
      const data = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
      let at = 0;
      for (const { gpa, length } of parts) {
        memory.read(gpa, data.subarray(at, at + length));
        at += length;
      }
      done.push({ head, written, data });
    }
    return done;
  }

  /** Makes one request and expects it done at once. */
  request(buffers: readonly Buffer[], options: { indirect?: boolean } = {}): Completion {
    const head = this.send(buffers, options);
    const [completion, ...more] = this.completions();
    if (completion?.head !== head || more.length > 0) throw new Error('the request was not completed at once');
    return completion;
  }

  /** Waits for as many completions while `pump` lets the device's host side make progress. */
  async completed(count: number, pump: () => void | Promise<void>): Promise<Completion[]> {
    const done: Completion[] = [];
    for (const end = Date.now() + 60_000; done.length < count; ) {
      if (Date.now() > end) throw new Error(`${done.length} of ${count} requests were completed`);
      await pump();
      await new Promise((resolve) => setImmediate(resolve));
      done.push(...this.completions());
    }
    return done;
  }
}
