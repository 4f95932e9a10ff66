import { createHash } from 'node:crypto';
import { SnapshotError } from '#dist/errors.js';
import type { Mapping } from '#dist/kvm/addon.js';
import { addon } from '#dist/kvm/addon.js';
import { MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE } from '#dist/kvm/generated/abi.js';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { StateReader } from '#dist/state-reader.js';
import type { DescriptorChain } from '#dist/virtio/chain.js';
import { feature, type VirtioContext, type VirtioModel } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { MockDriver } from '../support/virtio/mock-driver.js';
import { WatchedMemory } from '../support/virtio/watched-memory.js';
import { QueueMonitor } from './queue-monitor.js';

const { VIRTIO_CONFIG_S_DRIVER_OK: DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET: NEEDS_RESET } = abi;

/** Guest RAM: two regions that touch, one apart for a well-behaved driver, one above 4 GiB. */
export const RAM = [
  { gpa: 0, size: 0x1_0000 },
  { gpa: 0x1_0000, size: 0x8000 },
  { gpa: 0x10_0000, size: 0x1_0000 },
  { gpa: 2 ** 32, size: 0x4000 },
] as const;
/** The end of the two that touch. */
export const LOW_END = 0x1_8000;
const WELL_BEHAVED = 0x10_0000;

/** A rule was broken: a defect of the program, or of the fuzzer. */
export class Violation extends Error {
  override readonly name = 'Violation';
}

/** The memory of all cases of a target. */
export class Memory implements Disposable {
  readonly guest: GuestMemory;
  readonly device: WatchedMemory;
  readonly regions: readonly (readonly [gpa: number, mapping: Mapping])[];
  /** Host memory that is no guest's, mapped before and after the guest's. */
  readonly #guards: Uint8Array[] = [];
  readonly #mappings: Mapping[] = [];

  constructor() {
    const map = (size: number) => {
      const mapping = new addon.Mapping(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      this.#mappings.push(mapping);
      return mapping;
    };
    this.regions = RAM.map(({ gpa, size }) => {
      this.#guards.push(new Uint8Array(map(0x4000).buffer).fill(0xa5));
      return [gpa, map(size)] as const;
    });
    this.#guards.push(new Uint8Array(map(0x4000).buffer).fill(0xa5));
    const regions = this.regions.map(([gpa, { buffer }]) => ({ gpa, buffer }));
    this.guest = new GuestMemory(regions);
    this.device = new WatchedMemory(regions);
  }

  clear(): void {
    for (const { gpa, size } of RAM) this.guest.zero(gpa, size);
  }

  /** A digest of all of it. */
  get digest(): string {
    const hash = createHash('sha1');
    for (const [, { buffer }] of this.regions) hash.update(new Uint8Array(buffer));
    return hash.digest('hex').slice(0, 16);
  }

  [Symbol.dispose](): void {
    for (const mapping of this.#mappings) mapping.unmap();
  }

  checkGuards(): void {
    if (this.#guards.some((guard) => guard.some((byte) => byte !== 0xa5))) throw new Violation('a guard was written');
  }
}

export interface Limits {
  /** Accesses to guest memory, and bytes copied, that one operation of the guest or the host may cause. */
  readonly accesses: number;
  readonly bytes: number;
}

/** One device with its transport and everything that watches them. */
export class FuzzMachine {
  readonly memory: Memory;
  readonly driver: MockDriver;
  readonly limits: Limits;
  monitors: QueueMonitor[] = [];
  /** Those performed. */
  operations = 0;
  /** What was done, while anybody wants to know. */
  trace: string[] | undefined;
  /** A chain is the device's now; a driver is ready. */
  onPop: ((chain: DescriptorChain) => void) | undefined;
  onActivate: (() => void) | undefined;
  #violation: string | undefined;

  constructor(device: VirtioModel, memory: Memory, limits: Limits) {
    this.memory = memory;
    this.limits = limits;
    const view = memory.device;
    view.onStore = (gpa, length) => this.#checkStore(gpa, length);
    view.onRead = (gpa, length) => this.#checkRead(gpa, length);
    this.driver = new MockDriver(this.#watched(device), memory.guest, { deviceMemory: view, from: WELL_BEHAVED });
  }

  get guest(): GuestMemory {
    return this.memory.guest;
  }

  /** The driver is ready and the device has not given up. */
  get live(): boolean {
    return (this.driver.status & (DRIVER_OK | NEEDS_RESET)) === DRIVER_OK;
  }

  /** Runs one operation of the guest or the host. @throws Violation */
  perform(operation: () => void): void {
    const { device } = this.memory;
    this.operations++;
    device.accesses = device.bytes = 0;
    device.budget = this.limits.accesses;
    device.byteBudget = this.limits.bytes;
    try {
      operation();
    } catch (error) {
      throw new Violation(`it threw: ${describe(error)}`);
    } finally {
      device.budget = device.byteBudget = Number.POSITIVE_INFINITY;
    }
    this.check();
  }

  /** What must be true between operations. */
  check(): void {
    const { driver } = this;
    if (this.#violation) throw new Violation(this.#violation);
    const internal = driver.broken.find((what) => what.includes('internal error'));
    if (internal) throw new Violation(internal);
    const interrupts = driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS);
    if (interrupts > 3 || driver.level !== (interrupts !== 0)) throw new Violation(`interrupt status ${interrupts}`);
    if (!(driver.status & DRIVER_OK) && interrupts !== 0) throw new Violation('an interrupt without a driver');
    if (driver.broken.length > 1000) throw new Violation('the log has no end');
  }

  /**
   * Saves the device and has another go on, by way of JSON. @param damage changes the state; what cannot be is refused,
   * and the other is as after power-on then.
   */
  move(renew: () => VirtioModel, damage: (state: object) => void = () => {}): string {
    const other = renew();
    const state = JSON.parse(JSON.stringify(this.driver.transport.save()));
    damage(state);
    this.monitors = [];
    this.driver.plug(this.#watched(other));
    try {
      this.driver.transport.restore(new StateReader(state, 'device'));
      return 'it goes on';
    } catch (error) {
      if (!(error instanceof SnapshotError)) throw error;
      this.monitors = [];
      this.driver.plug(this.#watched(renew()));
      return error.message;
    }
  }

  fail(what: string): void {
    this.#violation ??= what;
  }

  /** Guest memory is used by native I/O. */
  readonly checkIo = (gpa: number, length: number, stored: boolean): void => {
    if (stored) this.#checkStore(gpa, length);
    else this.#checkRead(gpa, length);
  };

  #checkStore(gpa: number, length: number): void {
    if (this.monitors.some((monitor) => monitor.mayStore(gpa, length))) return;
    this.fail(`the device stored ${length} bytes at 0x${gpa.toString(16)}, which it was not given`);
  }

  #checkRead(gpa: number, length: number): void {
    if (length === 0 || this.monitors.some((monitor) => monitor.mayRead(gpa, length))) return;
    this.fail(`the device read ${length} bytes at 0x${gpa.toString(16)}, which it was not given`);
  }

  /** The device, with monitors on its queues; an error that it throws is not forgotten when the transport contains it. */
  #watched(device: VirtioModel): VirtioModel {
    const guarded = <T>(call: () => T): T => {
      try {
        return call();
      } catch (error) {
        this.fail(`the device threw: ${describe(error)}`);
        throw error;
      }
    };
    return {
      name: device.name,
      type: device.type,
      queueSizes: device.queueSizes,
      features: device.features,
      acceptsFeatures: (features) => guarded(() => device.acceptsFeatures?.(features) ?? true),
      readConfig: (offset, out) => guarded(() => device.readConfig(offset, out)),
      writeConfig: (offset, data) => guarded(() => device.writeConfig?.(offset, data)),
      activate: (context) =>
        guarded(() => {
          this.#monitor(context);
          this.onActivate?.();
          device.activate(context);
        }),
      handleQueue: (index) =>
        guarded(() => {
          if (!this.monitors[index]?.queue.alive) this.fail(`queue ${index} was handled, which is not in use`);
          device.handleQueue(index);
        }),
      reset: () =>
        guarded(() => {
          if (this.monitors.some(({ queue }) => queue.alive)) this.fail('a queue is open in a reset');
          this.monitors = [];
          device.reset();
        }),
      ...(device.save && { save: () => guarded(() => device.save?.() ?? {}) }),
      ...(device.restore && { restore: (state: StateReader) => device.restore?.(state) }),
    };
  }

  #monitor({ queues }: VirtioContext): void {
    const negotiated = BigInt(`0x${this.driver.transport.save().driverFeatures}`);
    this.monitors = queues.map(
      (queue) =>
        new QueueMonitor(queue, {
          memory: this.guest,
          eventIndex: (negotiated & feature(abi.VIRTIO_RING_F_EVENT_IDX)) !== 0n,
          interrupted: () => (this.driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS) & abi.VIRTIO_MMIO_INT_VRING) !== 0,
          fail: (what) => this.fail(what),
          onPop: (chain) => this.onPop?.(chain),
        }),
    );
  }
}

function describe(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}
