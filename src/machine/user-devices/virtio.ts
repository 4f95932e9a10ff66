import type { DeviceState } from '../../bus/bus.js';
import type { Queue, VirtioDevice, VirtioDeviceHost } from '../../device/virtio-device.js';
import type { StateReader } from '../../state-reader.js';
import type { VirtioContext, VirtioModel } from '../../virtio/device.js';
import { UserQueue } from './queue.js';
import { settled, UserDevice } from './user-device.js';

/** Bytes of a virtio-mmio device's range after its registers. */
const MAX_CONFIG = 0x1000 - 0x100;
const MAX_QUEUES = 32;
const MAX_QUEUE_SIZE = 2 ** 15;
/** Bits 24 to 49 are the rings' and the transport's (virtio 1.2 section 2.2). */
const DEVICE_FEATURES = (1n << 128n) - 1n - (((1n << 26n) - 1n) << 24n);

/** A user's virtio device, to the transport. */
export class UserVirtio extends UserDevice<VirtioDevice> implements VirtioModel, VirtioDeviceHost {
  type = 0;
  queueSizes: readonly number[] = [];
  features = 0n;
  queues: readonly Queue[] = [];
  accepted = 0n;
  #context: VirtioContext | undefined;

  /** Says what is wrong with a device; undefined when nothing is. */
  static problem({ type, queueSizes, features, config, handleQueue }: VirtioDevice): string | undefined {
    if (!(Number.isInteger(type) && type >= 1 && type < 2 ** 32)) return `type: ${type} is not 1 to 2^32 - 1`;
    if (!Array.isArray(queueSizes) || queueSizes.length < 1 || queueSizes.length > MAX_QUEUES)
      return `queueSizes: must have 1 to ${MAX_QUEUES} entries`;
    const bad = queueSizes.find((size) => !(size >= 1 && size <= MAX_QUEUE_SIZE && Number.isInteger(Math.log2(size))));
    if (bad !== undefined) return `queueSizes: ${bad} is not a power of two up to ${MAX_QUEUE_SIZE}`;
    if (typeof features !== 'bigint' || features & ~DEVICE_FEATURES)
      return 'features: must be a bigint of the bits 0 to 23 and 50 to 127';
    if (!(config instanceof Uint8Array) || config.length > MAX_CONFIG)
      return `config: must be a Uint8Array of at most ${MAX_CONFIG} bytes`;
    return typeof handleQueue === 'function' ? undefined : 'handleQueue: it has no such method';
  }

  /** What the transport goes by is the device's as it was made. */
  override adopt(device: VirtioDevice): void {
    super.adopt(device);
    this.type = device.type;
    this.queueSizes = [...device.queueSizes];
    this.features = device.features;
  }

  configChanged(): void {
    this.#context?.configChanged();
  }

  readConfig(offset: number, out: Uint8Array): void {
    this.#call(() => this.device.readConfig(offset, out));
  }

  writeConfig(offset: number, data: Uint8Array): void {
    this.#call(() => this.device.writeConfig(offset, data.slice()));
  }

  activate(context: VirtioContext): void {
    this.#context = context;
    this.accepted = context.features;
    this.queues = context.queues.map((queue) => new UserQueue(queue));
    if (this.stopped) context.fail('it was stopped before its driver came');
  }

  handleQueue(index: number): void {
    this.#call(() => this.device.handleQueue(index));
  }

  reset(): void {
    this.#end();
    this.stopped = false;
    this.#call(() => this.device.reset());
  }

  /** @throws DeviceError */
  save(): DeviceState {
    const state = this.saveDevice();
    for (const queue of this.queues) queue.publish(); // what was pushed is not saved otherwise
    const queues = this.queueSizes.map(
      (_, index) => (this.queues[index] as UserQueue | undefined)?.save() ?? { kept: [] },
    );
    return { ...state, queues };
  }

  restore(state: StateReader): void {
    state.listOf('queues', this.queueSizes.length).forEach((queue, index) => {
      (this.queues[index] as UserQueue | undefined)?.restore(queue);
    });
    this.restoreDevice(state);
  }

  override powerOff(): void {
    super.powerOff();
    this.#end();
    this.stopped = false;
    this.guard(() => this.device.reset());
  }

  protected onFailure(why: string): void {
    if (this.#context) this.#context.fail(why);
    else this.warn(`device ${this.name}: ${why}; it waits for a reset`);
  }

  #end(): void {
    for (const queue of this.queues) (queue as UserQueue).close();
    this.queues = [];
    this.accepted = 0n;
    this.#context = undefined;
  }

  /** A call that the transport makes: it sets DEVICE_NEEDS_RESET, and warns, for what is thrown. */
  #call(call: () => unknown): void {
    if (this.stopped) return;
    try {
      settled(call());
    } catch (error) {
      this.fail(error);
      throw error;
    }
  }
}
