import { errorToData } from '../errors.js';
import { Kvm } from '../kvm/kvm.js';
import type { MachineConfig } from './config.js';
import { Machine } from './machine.js';

/** A machine on its way. */
export interface PooledMachine {
  readonly machine: Machine;
  /** Rejects when the guest does not come up. */
  readonly ready: Promise<void>;
}

/** Fresh machines of one configuration, at most one of them ahead of its use. */
export class MachinePool {
  /** Why there can be no machine on this host; undefined when there can. */
  readonly unavailable: string | undefined;
  readonly #config: MachineConfig;
  readonly #whenReady: (machine: Machine) => Promise<void>;
  readonly #made = new Set<Promise<PooledMachine>>();
  #spare: Promise<PooledMachine> | undefined;

  /** @param whenReady waits until a machine that has been started can be used. */
  constructor(config: MachineConfig, whenReady: (machine: Machine) => Promise<void>) {
    this.#config = config;
    this.#whenReady = whenReady;
    try {
      Kvm.open().close();
    } catch (error) {
      this.unavailable = errorToData(error).message;
    }
  }

  /** A machine that nobody has had. @throws as Machine.create() does. */
  take(): Promise<PooledMachine> {
    const machine = this.#spare ?? this.#make();
    this.#spare = undefined;
    return machine;
  }

  /** Lets the next machine boot. */
  prepare(): void {
    this.#spare ??= this.#make();
  }

  /** Closes every machine that it made. */
  async close(): Promise<void> {
    const made = await Promise.allSettled(this.#made);
    await Promise.all(made.map((result) => (result.status === 'fulfilled' ? result.value.machine.close() : undefined)));
  }

  #make(): Promise<PooledMachine> {
    const made = this.#boot();
    made.catch(() => {}); // whoever takes it learns of it
    this.#made.add(made);
    return made;
  }

  async #boot(): Promise<PooledMachine> {
    const machine = await Machine.create(this.#config);
    const ready = machine.start().then(() => this.#whenReady(machine));
    ready.catch(() => {});
    return { machine, ready };
  }
}
