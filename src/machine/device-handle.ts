import { EventEmitter } from 'node:events';
import { DeviceError, UsageError } from '../errors.js';
import { type Deferred, deferred } from './deferred.js';
import type { DevicePlace, DeviceReport, DeviceRequest } from './messages.js';

/** Messages that were taken are told of in batches. */
const TAKEN_BATCH = 256;

/** Events of a DeviceHandle. */
export interface DeviceEvents {
  /** The device sent a value. Messages wait for the first listener, or for whoever iterates. */
  message: [value: unknown];
  /** A method of the device threw: it is stopped until it is reset, by its driver (virtio) or with the guest (MMIO). */
  failed: [error: DeviceError];
  /** The machine has ended: there are no more messages. */
  close: [];
}

/**
 * A device of the configuration's `devices`, seen by the program: its other half is on the machine thread. What the
 * device sends comes as `message` events, or one at a time to `for await (const value of handle)`, which ends with the
 * machine; each message goes to one of those that iterate, and to none of them while there are listeners.
 */
export interface DeviceHandle extends EventEmitter<DeviceEvents>, AsyncIterable<unknown> {
  readonly name: string;
  /** Guest physical address of its registers. */
  readonly address: number;
  /** Its global system interrupt (IOAPIC pin); undefined for a device without one. */
  readonly interrupt: number | undefined;
  /**
   * Sends a value to the device's onMessage(), by structured clone. No effect once the machine has ended.
   * @throws DataCloneError for what cannot be cloned.
   */
  postMessage(value: unknown): void;
}

type Send = (request: { value: unknown } | { taken: number }) => void;
type Next = IteratorResult<unknown, undefined>;

class MachineDevice extends EventEmitter<DeviceEvents> implements DeviceHandle {
  readonly name: string;
  place: DevicePlace = { base: 0, length: 0, gsi: undefined };
  readonly #send: Send;
  readonly #messages: unknown[] = [];
  readonly #waiting: Deferred<Next>[] = [];
  #taken = 0;
  #closed = false;

  constructor(name: string, send: Send) {
    super();
    this.name = name;
    this.#send = send;
    (this as NodeJS.EventEmitter).on('newListener', () => queueMicrotask(() => this.#flow()));
  }

  get address(): number {
    return this.place.base;
  }

  get interrupt(): number | undefined {
    return this.place.gsi;
  }

  postMessage(value: unknown): void {
    if (!this.#closed) this.#send({ value });
  }

  [Symbol.asyncIterator](): AsyncIterator<unknown, undefined> {
    return {
      next: async () => {
        if (this.#messages.length > 0) return { done: false, value: this.#take() };
        if (this.#closed) return { done: true, value: undefined };
        const next = deferred<Next>();
        this.#waiting.push(next);
        return next.promise;
      },
    };
  }

  receive(report: DeviceReport): void {
    if (report.type === 'device-message') {
      this.#messages.push(report.value);
      this.#flow();
      return;
    }
    this.#count();
    this.emit('failed', new DeviceError(`device '${this.name}' threw ${report.why}`));
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const next of this.#waiting.splice(0)) next.resolve({ done: true, value: undefined });
    this.emit('close');
  }

  #flow(): void {
    while (this.#messages.length > 0) {
      const listened = this.listenerCount('message') > 0;
      const next = listened ? undefined : this.#waiting.shift();
      if (!listened && !next) return;
      const value = this.#take();
      if (next) next.resolve({ done: false, value });
      else this.emit('message', value);
    }
  }

  #take(): unknown {
    this.#count();
    return this.#messages.shift();
  }

  #count(): void {
    if (this.#closed || ++this.#taken < TAKEN_BATCH) return;
    this.#send({ taken: this.#taken });
    this.#taken = 0;
  }
}

/** The handles of a machine's devices. */
export class DeviceHandles {
  readonly #handles: readonly MachineDevice[];

  /** @param send puts a request on its way to the machine thread. */
  constructor(devices: readonly { readonly name: string }[], send: (request: DeviceRequest) => void) {
    this.#handles = devices.map(
      ({ name }, device) => new MachineDevice(name, (request) => send({ device, ...request })),
    );
  }

  /** @throws UsageError */
  get(name: string): DeviceHandle {
    const handle = this.#handles.find((handle) => handle.name === name);
    if (handle) return handle;
    const names = this.#handles.map(({ name }) => name).join(', ');
    throw new UsageError(`there is no device '${name}'; this machine has ${names || 'none'}`);
  }

  place(places: readonly DevicePlace[]): void {
    places.forEach((place, index) => {
      const handle = this.#handles[index];
      if (handle) handle.place = place;
    });
  }

  receive(report: DeviceReport): void {
    this.#handles[report.device]?.receive(report);
  }

  close(): void {
    for (const handle of this.#handles) handle.close();
  }
}
