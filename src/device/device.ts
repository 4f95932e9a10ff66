import type { GuestMemory } from '../memory/guest-memory.js';

/** How much a line of the log matters. */
export type LogLevel = 'debug' | 'info' | 'warn';

/** A one-shot timer of a device. */
export interface Timer {
  /**
   * Has the callback called once, after this time or somewhat later. Arming an armed timer replaces its time.
   * @param microseconds 1 to 2^32 - 1 (71 minutes). @throws RangeError
   */
  arm(microseconds: number): void;
  /** Undoes arm(). */
  cancel(): void;
}

/** A device's way to the program that has the machine: `machine.device(name)` is its other end. */
export interface Channel {
  /**
   * Sends a value, by structured clone. At most 1024 messages may be on their way that the program has not taken (it
   * tells of every 256th): the guest may be what makes a device send, and must not fill the program's memory. A device
   * that has no more than 512 requests open at a time never comes there. What a message holds at most is the device's
   * own matter.
   * @returns false when there are that many: the value was not sent. onDrain() says when there is room again.
   * @throws DataCloneError for what cannot be cloned.
   */
  postMessage(value: unknown): boolean;
}

/** What a machine does for a device of either kind. */
export interface DeviceHost {
  readonly channel: Channel;
  /** @throws Error while no machine is powered on. */
  readonly memory: GuestMemory;
  /** @throws RangeError for too many. */
  timer(onExpired: () => void): Timer;
  /** A line for the machine's log. */
  log(level: LogLevel, message: string): void;
}

/** What a device is made from. A unit test of a device passes its own. */
export interface DeviceInit<Options, Host extends DeviceHost> {
  /** The device's name in the machine's configuration. */
  readonly name: string;
  /** The `options` of the machine's configuration, a clone. */
  readonly options: Options;
  readonly host: Host;
}

/**
 * What devices of both kinds have. There is one instance for the life of a machine, also over resets of the guest. It
 * lives on the machine thread, which is the thread that runs the guest: every method must return promptly, and since
 * that thread's event loop does not run meanwhile, no promise settles there, no callback of Node's comes: what needs
 * those belongs into the program, at the other end of the channel.
 *
 * A method that throws stops the device until it is reset: the program is told by the handle's `failed` event and a
 * warning in the log. What a guest does to a device should not throw.
 */
export abstract class Device<Options, Host extends DeviceHost> {
  /** The device's name in the machine's configuration. */
  readonly name: string;
  /** The `options` of the machine's configuration, a clone. */
  readonly options: Options;
  /** The way to the program. */
  readonly channel: Channel;
  protected readonly host: Host;

  constructor(init: DeviceInit<Options, Host>) {
    this.name = init.name;
    this.options = init.options;
    this.channel = init.host.channel;
    this.host = init.host;
  }

  /**
   * The guest's RAM by guest physical address; every access is checked and throws when it is not RAM.
   * @throws Error in the constructor: there is no guest yet.
   */
  get memory(): GuestMemory {
    return this.host.memory;
  }

  /**
   * Makes a timer, for the life of the device. A device that was stopped is not called.
   * @throws RangeError for more than 64.
   */
  timer(onExpired: () => void): Timer {
    return this.host.timer(onExpired);
  }

  /** A line for the machine's log, at most 60 a minute from each device: a guest may be what causes it. */
  log(level: LogLevel, message: string): void {
    this.host.log(level, message);
  }

  /** The program sent a value with `machine.device(name).postMessage()`. */
  onMessage(_value: unknown): void {}

  /** There is room again for messages, after channel.postMessage() has returned false. */
  onDrain(): void {}

  /** Back to the state after power-on: the guest was reset. */
  reset(): void {}

  /**
   * What a snapshot of the machine is to carry of the device, as JSON: numbers, texts, booleans, null, lists and plain
   * objects, at most 2^20 characters. Its queues, its interrupt and guest memory are carried without it; timers and
   * messages on their way are not. When this throws, or returns anything else, machine.snapshot() rejects with
   * ERR_DEVICE, and machine and device go on. Without it, the device begins as after power-on in a restored machine.
   */
  save?(): unknown;

  /**
   * Takes over what save() gave, in a machine that goes on from a snapshot; of a virtio device after its queues are
   * there, and before handleQueue() is called for each of them. Not called when nothing was saved. A snapshot may be
   * anybody's: check what it says. When this throws, Machine.restore() rejects with ERR_DEVICE.
   */
  restore?(state: unknown): void;
}
