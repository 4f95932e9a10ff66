import type { BusDevice, DeviceState } from '../../bus/bus.js';
import type { InterruptLine } from '../../devices/host.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { StateReader } from '../../state-reader.js';
import { feature, type VirtioModel } from '../device.js';
import * as abi from '../generated/virtio.js';
import { type QueuePolling, type QueueState, queueProblem, Virtqueue } from '../queue.js';

/** "virt", little-endian. */
const MAGIC = 0x74726976;
/** Version 2: virtio 1.0 and later (section 4.2.2). */
const VERSION = 2;
/** Not assigned to anybody; "tsv". */
const VENDOR = 0x767374;
/** SHMLen and SHMBase of a region that does not exist (section 4.2.2). */
const NO_SHARED_MEMORY = 0xffff_ffff;

const { VIRTIO_CONFIG_S_DRIVER_OK: DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK: FEATURES_OK } = abi;
const { VIRTIO_CONFIG_S_NEEDS_RESET: NEEDS_RESET } = abi;
/** The bits that a driver sets (section 2.1). */
const DRIVER_BITS =
  abi.VIRTIO_CONFIG_S_ACKNOWLEDGE | abi.VIRTIO_CONFIG_S_DRIVER | DRIVER_OK | FEATURES_OK | abi.VIRTIO_CONFIG_S_FAILED;

const TRANSPORT_FEATURES =
  feature(abi.VIRTIO_F_VERSION_1) | feature(abi.VIRTIO_RING_F_INDIRECT_DESC) | feature(abi.VIRTIO_RING_F_EVENT_IDX);

/** Bytes of guest physical address space that a device takes. */
export const MMIO_LENGTH = 0x1000;

const U32 = 0xffff_ffff;
const ALL_INTERRUPTS = abi.VIRTIO_MMIO_INT_VRING | abi.VIRTIO_MMIO_INT_CONFIG;

/** Where a driver puts the parts of a queue: registers of the lower halves, each followed by that of the upper half. */
const QUEUE_ADDRESSES = [
  ['descriptors', abi.VIRTIO_MMIO_QUEUE_DESC_LOW],
  ['available', abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW],
  ['used', abi.VIRTIO_MMIO_QUEUE_USED_LOW],
] as const;

/** What of a device and its transport is saved. */
export interface TransportState {
  readonly status: number;
  readonly deviceFeaturesSelector: number;
  readonly driverFeaturesSelector: number;
  /** In hexadecimal. */
  readonly driverFeatures: string;
  readonly queueSelector: number;
  readonly queues: readonly (QueueState & QueuePosition & { readonly ready: boolean })[];
  readonly interruptStatus: number;
  readonly configGeneration: number;
  readonly device: DeviceState;
}

/** How far a device has come in a queue; `alive`: it is still to be served. */
type QueuePosition = Pick<QueueState, 'nextAvailable' | 'nextUsed'> & { readonly alive: boolean };

/** What the driver wrote of a queue: 32-bit registers by offset / 4, of which only those of set-up are read. */
interface QueueSetup {
  readonly registers: Uint32Array;
  ready: boolean;
}

/** What the transport needs of its machine. */
export interface TransportHost {
  readonly memory: GuestMemory;
  /**
   * Up while the interrupt status is not 0, which suits a level-triggered input; and up anew after an acknowledgement
   * that leaves something, for an edge-triggered one.
   */
  readonly interrupt: InterruptLine;
  /** Polls queues, where that is to be. */
  readonly polling?: QueuePolling | undefined;
  /** Says once per driver initialization what a driver did wrong: its device stopped. */
  readonly broken: (what: string) => void;
}

/**
 * Virtio over MMIO (virtio 1.2 section 4.2): discovery, feature negotiation, status, queue set-up and notifications for
 * one device. What a driver does against the rules has no effect, or, where the device could not go on, sets
 * DEVICE_NEEDS_RESET: the device then does nothing until it is reset.
 */
export class VirtioMmio implements BusDevice {
  readonly name: string;
  readonly device: VirtioModel;
  readonly #host: TransportHost;
  readonly #offered: bigint;
  #status = 0;
  #deviceFeaturesSelector = 0;
  #driverFeaturesSelector = 0;
  #driverFeatures = 0n;
  #queueSelector = 0;
  #queues: QueueSetup[];
  /** While the driver is ready. */
  #active: Virtqueue[] = [];
  #interruptStatus = 0;
  #configGeneration = 0;
  #notifications = 0;
  #polled = 0;
  #interrupts = 0;

  constructor(device: VirtioModel, host: TransportHost) {
    this.name = `virtio ${device.name}`;
    this.device = device;
    this.#host = host;
    this.#offered = device.features | TRANSPORT_FEATURES;
    this.#queues = this.#freshQueues();
  }

  /** What happened since power-on: the device's own counters too. */
  get counters(): Readonly<Record<string, number>> {
    return {
      notifications: this.#notifications,
      polled: this.#polled,
      interrupts: this.#interrupts,
      ...this.device.counters,
    };
  }

  read(offset: number, data: Uint8Array): void {
    if (offset >= abi.VIRTIO_MMIO_CONFIG) {
      this.#guarded(() => this.device.readConfig(offset - abi.VIRTIO_MMIO_CONFIG, data));
      return;
    }
    // Section 4.2.2.2: registers are read and written in 32 bits, aligned. Anything else reads as absent.
    if (data.length !== 4 || offset & 3) return;
    const value = this.#register(offset);
    data[0] = value;
    data[1] = value >>> 8;
    data[2] = value >>> 16;
    data[3] = value >>> 24;
  }

  write(offset: number, data: Uint8Array): void {
    if (offset >= abi.VIRTIO_MMIO_CONFIG) {
      this.#guarded(() => this.device.writeConfig?.(offset - abi.VIRTIO_MMIO_CONFIG, data));
      return;
    }
    if (data.length !== 4 || offset & 3) return;
    const value =
      ((data[0] as number) | ((data[1] as number) << 8) | ((data[2] as number) << 16)) + (data[3] as number) * 2 ** 24;
    if (offset === abi.VIRTIO_MMIO_QUEUE_NOTIFY) {
      this.#notifications++;
      this.#notify(value);
    } else if (offset === abi.VIRTIO_MMIO_INTERRUPT_ACK) this.#acknowledge(value);
    else this.#setRegister(offset, value);
  }

  /** Power-on state, as the machine's reset does. */
  reset(): void {
    this.#status = 0;
    this.#deviceFeaturesSelector = this.#driverFeaturesSelector = this.#queueSelector = 0;
    this.#driverFeatures = 0n;
    this.#queues = this.#freshQueues();
    this.#closeQueues();
    this.#setInterruptStatus(0);
    this.#guarded(() => this.device.reset());
  }

  /** @throws what the device's save() does */
  save(): TransportState {
    const device = this.device.save?.() ?? {}; // first: it may use its queues
    const queues = this.#queues.map((queue, i) => {
      const active = this.#active[i];
      return { ready: queue.ready, alive: active?.alive ?? false, ...(active?.state ?? placement(queue)) };
    });
    return {
      status: this.#status,
      deviceFeaturesSelector: this.#deviceFeaturesSelector,
      driverFeaturesSelector: this.#driverFeaturesSelector,
      driverFeatures: this.#driverFeatures.toString(16),
      queueSelector: this.#queueSelector,
      queues,
      interruptStatus: this.#interruptStatus,
      configGeneration: this.#configGeneration,
      device,
    };
  }

  /**
   * Takes over a saved state, of a device of the same kind as it is after power-on, and goes on with its requests.
   * @throws SnapshotError that names what cannot be.
   */
  restore(state: StateReader): void {
    const status = state.number('status', 0, DRIVER_BITS | NEEDS_RESET);
    if (status & ~(DRIVER_BITS | NEEDS_RESET) || (status & (DRIVER_OK | FEATURES_OK)) === DRIVER_OK) {
      state.refuse('status', `is ${status}, which no device's is`);
    }
    this.#status = status;
    this.#deviceFeaturesSelector = state.number('deviceFeaturesSelector', 0, U32);
    this.#driverFeaturesSelector = state.number('driverFeaturesSelector', 0, U32);
    this.#driverFeatures = state.bigint('driverFeatures', 128);
    this.#queueSelector = state.number('queueSelector', 0, U32);
    this.#configGeneration = state.number('configGeneration', 0, U32);
    if (status & FEATURES_OK && !this.#featuresAcceptable()) {
      state.refuse('driverFeatures', 'are not what this device offers here');
    }
    const saved = state.listOf('queues', this.#queues.length);
    const positions = saved.map((queue, index) => this.#restoreQueue(queue, index));
    const active = status & DRIVER_OK && !(status & NEEDS_RESET);
    if (active) this.#activate(positions);
    const own = state.object('device');
    this.device.restore?.(own);
    // KVM's state says which lines are up, but not who holds them up.
    const interrupts = state.number('interruptStatus', 0, status & DRIVER_OK ? ALL_INTERRUPTS : 0);
    this.#setInterruptStatus(this.#interruptStatus | interrupts);
    for (let i = 0; i < this.#active.length; i++) this.#notify(i);
  }

  /** Takes over what the driver set up of a queue. @returns how far the device had come in it. */
  #restoreQueue(saved: StateReader, index: number): QueuePosition {
    const queue = this.#queues[index] as QueueSetup;
    const { registers } = queue;
    registers[abi.VIRTIO_MMIO_QUEUE_NUM >> 2] = saved.number('size', 0, U32);
    for (const [name, register] of QUEUE_ADDRESSES) {
      const address = saved.number(name, 0, 2 ** 64);
      registers[register >> 2] = address % 2 ** 32;
      registers[(register >> 2) + 1] = address / 2 ** 32;
    }
    queue.ready = saved.boolean('ready');
    const { size, ...placed } = placement(queue);
    const maximum = this.device.queueSizes[index] as number;
    const problem = queue.ready && queueProblem(this.#host.memory, { size, ...placed }, maximum);
    if (problem) saved.refuse('ready', `cannot be: it is ${problem}`);
    const nextAvailable = saved.number('nextAvailable', 0, 0xffff);
    const nextUsed = saved.number('nextUsed', 0, 0xffff);
    const alive = saved.boolean('alive') && queue.ready;
    const kept = (nextAvailable - nextUsed) & 0xffff;
    if (alive && kept > size) saved.refuse('nextUsed', `leaves ${kept} chains in a queue of ${size}`);
    return { nextAvailable, nextUsed, alive };
  }

  #register(offset: number): number {
    const queue = this.#queues[this.#queueSelector];
    switch (offset) {
      case abi.VIRTIO_MMIO_MAGIC_VALUE:
        return MAGIC;
      case abi.VIRTIO_MMIO_VERSION:
        return VERSION;
      case abi.VIRTIO_MMIO_DEVICE_ID:
        return this.device.type;
      case abi.VIRTIO_MMIO_VENDOR_ID:
        return VENDOR;
      case abi.VIRTIO_MMIO_DEVICE_FEATURES:
        return this.#deviceFeaturesSelector > 3 ? 0 : word(this.#offered, this.#deviceFeaturesSelector);
      case abi.VIRTIO_MMIO_QUEUE_NUM_MAX:
        return this.device.queueSizes[this.#queueSelector] ?? 0;
      case abi.VIRTIO_MMIO_QUEUE_READY:
        return queue?.ready ? 1 : 0;
      case abi.VIRTIO_MMIO_INTERRUPT_STATUS:
        return this.#interruptStatus;
      case abi.VIRTIO_MMIO_STATUS:
        return this.#status;
      case abi.VIRTIO_MMIO_SHM_LEN_LOW:
      case abi.VIRTIO_MMIO_SHM_LEN_HIGH:
      case abi.VIRTIO_MMIO_SHM_BASE_LOW:
      case abi.VIRTIO_MMIO_SHM_BASE_HIGH:
        return NO_SHARED_MEMORY;
      case abi.VIRTIO_MMIO_CONFIG_GENERATION:
        return this.#configGeneration;
      default:
        return 0; // write-only, reserved or of the legacy interface
    }
  }

  #setRegister(offset: number, value: number): void {
    switch (offset) {
      case abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL:
        this.#deviceFeaturesSelector = value;
        return;
      case abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL:
        this.#driverFeaturesSelector = value;
        return;
      case abi.VIRTIO_MMIO_DRIVER_FEATURES:
        this.#setDriverFeatures(value);
        return;
      case abi.VIRTIO_MMIO_QUEUE_SEL:
        this.#queueSelector = value;
        return;
      case abi.VIRTIO_MMIO_STATUS:
        this.#setStatus(value);
        return;
    }
    const queue = this.#queues[this.#queueSelector];
    if (!queue) return;
    if (offset === abi.VIRTIO_MMIO_QUEUE_READY) this.#setQueueReady(queue, value);
    else if (!queue.ready && !(this.#status & DRIVER_OK)) queue.registers[offset >> 2] = value;
  }

  #setDriverFeatures(value: number): void {
    // Section 2.2.1: only before FEATURES_OK. Section 2.2: bits of devices go up to 127.
    if (this.#status & FEATURES_OK || this.#driverFeaturesSelector > 3) return;
    const shift = BigInt(32 * this.#driverFeaturesSelector);
    this.#driverFeatures = (this.#driverFeatures & ~(0xffff_ffffn << shift)) | (BigInt(value) << shift);
  }

  #setQueueReady(queue: QueueSetup, value: number): void {
    if (!(value & 1)) {
      // Section 4.2.2.1: its rings are the driver's again.
      queue.ready = false;
      this.#active[this.#queueSelector]?.close();
      return;
    }
    // Section 4.2.3.2: queues are set up before DRIVER_OK.
    if (queue.ready || this.#status & DRIVER_OK) return;
    const maximum = this.device.queueSizes[this.#queueSelector] as number;
    const problem = queueProblem(this.#host.memory, placement(queue), maximum);
    if (problem) this.#fail(`its driver set up ${problem}`);
    else queue.ready = true;
  }

  #setStatus(value: number): void {
    if (value === 0) {
      this.reset(); // section 4.2.2.1
      return;
    }
    const now = value & DRIVER_BITS;
    // Section 2.1.1: bits are only ever added.
    if (~now & this.#status & DRIVER_BITS) return;
    let next = this.#status | now;
    if (next & FEATURES_OK && !(this.#status & FEATURES_OK) && !this.#featuresAcceptable()) next &= ~FEATURES_OK;
    if (!(next & FEATURES_OK)) next &= ~DRIVER_OK;
    const starts = next & DRIVER_OK && !(this.#status & DRIVER_OK);
    this.#status = next;
    if (!starts) return;
    if (next & NEEDS_RESET)
      this.#configChanged(); // its queues could not be set up: a driver hears only from now on
    else this.#start();
  }

  /** Section 2.2.2 and 6.1: a subset of what was offered, with VERSION_1. */
  #featuresAcceptable(): boolean {
    const features = this.#driverFeatures;
    if (features & ~this.#offered || !(features & feature(abi.VIRTIO_F_VERSION_1))) return false;
    return this.device.acceptsFeatures?.(features & ~TRANSPORT_FEATURES) ?? true;
  }

  #start(): void {
    this.#activate(this.#queues.map(({ ready }) => ({ nextAvailable: 0, nextUsed: 0, alive: ready })));
    for (let i = 0; i < this.#active.length; i++) this.#notify(i);
  }

  #activate(positions: readonly QueuePosition[]): void {
    const features = this.#driverFeatures;
    const { memory, polling } = this.#host;
    const options = {
      eventIndex: (features & feature(abi.VIRTIO_RING_F_EVENT_IDX)) !== 0n,
      indirect: (features & feature(abi.VIRTIO_RING_F_INDIRECT_DESC)) !== 0n,
      interrupt: () => this.#setInterruptStatus(this.#interruptStatus | abi.VIRTIO_MMIO_INT_VRING),
      broken: (what: string) => this.#fail(`its driver made ${what}`),
    };
    const queues = this.#queues.map((setup, i) => {
      const { alive, ...position } = positions[i] as QueuePosition;
      const state = { ...placement(setup), ...position };
      const queue = new Virtqueue(memory, state, { ...options, limit: this.device.queueSizes[i] as number });
      if (!alive) queue.close();
      else if (polling) queue.pollBy(polling, i, (polled) => this.#workFound(i, polled));
      return queue;
    });
    this.#active = queues;
    this.#guarded(() => {
      this.device.activate({
        memory,
        queues,
        features: features & ~TRANSPORT_FEATURES,
        configChanged: () => this.#configChanged(),
        fail: (what) => {
          if (this.#active === queues) this.#fail(what);
        },
      });
    });
  }

  #notify(index: number): void {
    if (!this.#active[index]?.alive) return;
    try {
      this.device.handleQueue(index);
    } catch (error) {
      this.#failUnexpectedly(error);
    }
  }

  /** A queue that is polled has something, or its driver has notified without an exit to here. */
  #workFound(index: number, polled: boolean): void {
    if (polled) this.#polled++;
    else this.#notifications++;
    this.#notify(index);
  }

  #configChanged(): void {
    this.#configGeneration = (this.#configGeneration + 1) >>> 0;
    if (this.#status & DRIVER_OK) this.#setInterruptStatus(this.#interruptStatus | abi.VIRTIO_MMIO_INT_CONFIG);
  }

  /** Section 2.1.2: the driver is told by the status and a configuration change notification. */
  #fail(what: string): void {
    this.#closeQueues();
    if (this.#status & NEEDS_RESET) return;
    this.#status |= NEEDS_RESET;
    this.#host.broken(`${this.name}: ${what}; the device waits for a reset`);
    this.#configChanged();
  }

  #closeQueues(): void {
    for (const queue of this.#active) queue.close();
    this.#active = [];
  }

  #acknowledge(bits: number): void {
    const left = this.#interruptStatus & ~bits;
    // What came after the driver had looked made no edge.
    if (left !== this.#interruptStatus) this.#setInterruptStatus(0);
    this.#setInterruptStatus(left);
  }

  #setInterruptStatus(status: number): void {
    if (status === this.#interruptStatus) return;
    const wasHigh = this.#interruptStatus !== 0;
    this.#interruptStatus = status;
    if (!wasHigh) this.#interrupts++;
    if (wasHigh !== (status !== 0)) this.#host.interrupt.set(status !== 0);
  }

  /** A defect of a device must not end the machine: it stops that device. */
  #guarded(action: () => void): void {
    try {
      action();
    } catch (error) {
      this.#failUnexpectedly(error);
    }
  }

  #failUnexpectedly(error: unknown): void {
    this.#fail(`internal error: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`);
  }

  #freshQueues(): QueueSetup[] {
    return this.device.queueSizes.map(() => ({
      registers: new Uint32Array(abi.VIRTIO_MMIO_CONFIG / 4),
      ready: false,
    }));
  }
}

/** Addresses from 2^53 on are not exact: there is no RAM. */
function placement({ registers }: Pick<QueueSetup, 'registers'>): QueueState {
  const register = (offset: number) => registers[offset >> 2] as number;
  return {
    size: register(abi.VIRTIO_MMIO_QUEUE_NUM),
    descriptors: register(abi.VIRTIO_MMIO_QUEUE_DESC_HIGH) * 2 ** 32 + register(abi.VIRTIO_MMIO_QUEUE_DESC_LOW),
    available: register(abi.VIRTIO_MMIO_QUEUE_AVAIL_HIGH) * 2 ** 32 + register(abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW),
    used: register(abi.VIRTIO_MMIO_QUEUE_USED_HIGH) * 2 ** 32 + register(abi.VIRTIO_MMIO_QUEUE_USED_LOW),
    nextAvailable: 0,
    nextUsed: 0,
  };
}

function word(features: bigint, index: number): number {
  return Number((features >> BigInt(32 * index)) & 0xffff_ffffn);
}
