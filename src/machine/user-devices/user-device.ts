import { isDeepStrictEqual } from 'node:util';
import type { Channel, Device, DeviceHost, LogLevel, Timer } from '../../device/device.js';
import { DeviceError } from '../../errors.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { StateReader } from '../../state-reader.js';
import { type FdEvents, Timer as FdTimer } from '../fd-events.js';
import type { DevicePlace, DeviceReport } from '../messages.js';
import { RateLimit } from '../rate-limit.js';

/** Messages of a device that the program has not taken, at most. */
export const MAX_UNTAKEN = 1024;
const MAX_TIMERS = 64;
const MAX_TIMER_US = 2 ** 32 - 1;
const LOG_LINES_PER_MINUTE = 60;
/** Of a device's saved state, in characters of JSON. */
const MAX_STATE = 2 ** 20;

/** What the host of a user's device needs of its machine. */
export interface UserDeviceServices {
  readonly events: FdEvents;
  log(level: LogLevel, message: string): void;
  /** A warning that a guest can cause as often as it likes. */
  guestWarning(message: string): void;
  report(report: DeviceReport): void;
}

/** One power-on of the machine, as far as it concerns a device. */
export interface Power {
  readonly memory: GuestMemory;
  readonly setInterrupt: (level: boolean) => void;
}

/**
 * The machine's side of one user's device, of either kind: what the device is given, and the guard around every call of
 * it. A device that throws is not called until it is reset.
 */
export abstract class UserDevice<D extends Device<unknown, DeviceHost>> implements DeviceHost, Disposable {
  readonly channel: Channel = { postMessage: (value) => this.#postMessage(value) };
  /** Its place in the machine's configuration. */
  readonly index: number;
  readonly name: string;
  protected power: Power | undefined;
  protected stopped = false;
  readonly #services: UserDeviceServices;
  readonly #timers: FdTimer[] = [];
  readonly #lines = new RateLimit(LOG_LINES_PER_MINUTE);
  #device: D | undefined;
  #place: DevicePlace | undefined;
  /** Messages that the program has not taken. */
  #untaken = 0;
  #refused = false;

  constructor(index: number, name: string, services: UserDeviceServices) {
    this.index = index;
    this.name = name;
    this.#services = services;
  }

  /** Where the guest finds it. */
  get place(): DevicePlace {
    if (!this.#place) throw new Error(`device '${this.name}' has no place yet`);
    return this.#place;
  }

  set place(place: DevicePlace) {
    this.#place = place;
  }

  protected get device(): D {
    if (!this.#device) throw new Error(`device '${this.name}' is used before it is made`);
    return this.#device;
  }

  /** The device is made; its constructor had this already. */
  adopt(device: D): void {
    this.#device = device;
  }

  get memory(): GuestMemory {
    if (this.power) return this.power.memory;
    throw new Error(`device '${this.name}': there is no guest memory while the machine is not powered on`);
  }

  timer(onExpired: () => void): Timer {
    if (typeof onExpired !== 'function') throw new TypeError('timer: the callback is not a function');
    if (this.#timers.length === MAX_TIMERS) throw new RangeError(`a device has at most ${MAX_TIMERS} timers`);
    const timer = new FdTimer(this.#services.events, () => this.guard(onExpired));
    this.#timers.push(timer);
    return {
      arm: (microseconds) => {
        if (!(microseconds >= 1 && microseconds <= MAX_TIMER_US)) {
          throw new RangeError(`a timer of ${microseconds} µs: 1 to ${MAX_TIMER_US} are possible`);
        }
        timer.arm(microseconds);
      },
      cancel: () => timer.disarm(),
    };
  }

  log(level: LogLevel, message: string): void {
    if (this.#lines.take()) this.#services.log(level, `device ${this.name}: ${message}`);
  }

  /** A value from the program. */
  receive(value: unknown): void {
    this.guard(() => this.device.onMessage(value));
  }

  /** The program has taken so many messages. */
  taken(count: number): void {
    this.#untaken -= count;
    if (!this.#refused) return;
    this.#refused = false;
    this.guard(() => this.device.onDrain());
  }

  /** The machine is powered on. */
  powerOn(power: Power): void {
    this.power = power;
  }

  /** The machine's power is off: its memory goes. The device is reset. */
  powerOff(): void {
    this.power = undefined;
  }

  /** What of the device is saved. It goes on whatever it throws: the machine is not saved then. @throws DeviceError */
  protected saveDevice(): { readonly stopped: boolean; readonly state?: unknown } {
    const { stopped, device } = this;
    if (stopped || !device.save) return { stopped };
    let state: unknown;
    try {
      state = settled(device.save());
    } catch (cause) {
      throw new DeviceError(`device '${this.name}': its save() threw ${describe(cause)}`, { cause });
    }
    if (state === undefined) return { stopped };
    const copy = throughJson(state);
    if (copy === undefined) {
      const may = `numbers, texts, booleans, null, lists and plain objects, at most ${MAX_STATE} characters of JSON`;
      throw new DeviceError(`device '${this.name}': its save() returned what cannot be saved; it may be ${may}`);
    }
    return { stopped, state: copy };
  }

  /** Takes over what saveDevice() gave. @throws DeviceError, SnapshotError */
  protected restoreDevice(saved: StateReader): void {
    this.stopped = saved.boolean('stopped');
    if (this.stopped || !saved.has('state')) return;
    const { device } = this;
    if (!device.restore)
      throw new DeviceError(`device '${this.name}': it was saved with a state, but has no restore()`);
    try {
      settled(device.restore(saved.raw('state')));
    } catch (cause) {
      throw new DeviceError(`device '${this.name}': its restore() threw ${describe(cause)}`, { cause });
    }
  }

  [Symbol.dispose](): void {
    for (const timer of this.#timers) timer.close();
    this.#timers.length = 0;
  }

  /** Calls the device, unless it is stopped, and stops it when it throws. @returns undefined in both cases. */
  protected guard<T>(call: () => T): T | undefined {
    if (this.stopped) return undefined;
    try {
      return settled(call());
    } catch (error) {
      this.onFailure(this.fail(error));
      return undefined;
    }
  }

  /** Stops the device. @returns why. */
  protected fail(error: unknown): string {
    this.stopped = true;
    const why = describe(error);
    if (this.#untaken < MAX_UNTAKEN) {
      this.#untaken++;
      this.#services.report({ type: 'device-failed', device: this.index, why });
    }
    return why;
  }

  /** The device was stopped, by a call that its guest did not wait for. */
  protected abstract onFailure(why: string): void;

  protected warn(message: string): void {
    this.#services.guestWarning(message);
  }

  #postMessage(value: unknown): boolean {
    if (this.#untaken >= MAX_UNTAKEN) {
      this.#refused = true;
      return false;
    }
    this.#services.report({ type: 'device-message', device: this.index, value });
    this.#untaken++;
    return true;
  }
}

/** What a value is after it was JSON; undefined when that is not the same, or too long. */
function throughJson(value: unknown): unknown {
  try {
    const text = JSON.stringify(value) ?? '';
    const copy = text.length <= MAX_STATE ? JSON.parse(text) : undefined;
    return isDeepStrictEqual(copy, value) ? copy : undefined;
  } catch {
    return undefined;
  }
}

/** @throws TypeError for a promise: an easy mistake, and what comes after its first `await` would never be done. */
export function settled<T>(result: T): T {
  if (!(result instanceof Promise)) return result;
  result.catch(() => {});
  throw new TypeError('a method returned a promise, which never settles on the machine thread');
}

/** What was thrown, in a line, with where it was. */
export function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const at = /^\s+at (.*)$/m.exec(error.stack ?? '')?.[1];
  return `${error.name}: ${error.message.replaceAll('\n', ' ')}${at === undefined ? '' : ` (at ${at})`}`;
}
