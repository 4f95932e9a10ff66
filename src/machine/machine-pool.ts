import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
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

/**
 * Fresh machines of one configuration. The first boots, and is saved when it can be used; every machine that is taken
 * goes on from there. Devices of users need not know how to be saved: a machine that has some boots each time.
 */
export class MachinePool {
  /** Why there can be no machine on this host; undefined when there can. */
  readonly unavailable: string | undefined;
  readonly #config: MachineConfig;
  readonly #whenReady: (machine: Machine) => Promise<void>;
  readonly #made: Machine[] = [];
  #folder: string | undefined;
  /** The snapshot's folder, or a machine that did not come up. */
  #origin: Promise<string | PooledMachine> | undefined;

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

  /** A machine that nobody has had. @throws as Machine.create() and Machine.restore() do. */
  async take(): Promise<PooledMachine> {
    if (this.#config.devices?.length) return this.#boot();
    this.#origin ??= this.#save();
    const origin = await this.#origin;
    return typeof origin === 'string' ? this.#restore(origin) : origin;
  }

  /** Closes every machine that it made. */
  async close(): Promise<void> {
    await Promise.all(this.#made.map((machine) => machine.close()));
    if (this.#folder !== undefined) await rm(this.#folder, { recursive: true, force: true });
  }

  async #save(): Promise<string | PooledMachine> {
    const first = await this.#boot();
    try {
      await first.ready;
    } catch {
      this.#origin = undefined; // the next one may
      return first; // whoever takes it sees why, and its console
    }
    this.#folder = await mkdtemp(join(tmpdir(), 'tsvisor-test-'));
    const { path } = await first.machine.snapshot(join(this.#folder, 'ready'), { stop: true });
    await first.machine.close();
    return path;
  }

  async #boot(): Promise<PooledMachine> {
    const machine = await Machine.create(this.#config);
    this.#made.push(machine);
    const ready = machine.start().then(() => this.#whenReady(machine));
    ready.catch(() => {}); // whoever waits for it learns of it
    return { machine, ready };
  }

  async #restore(snapshot: string): Promise<PooledMachine> {
    const { networks, vsock } = this.#config;
    const options = { ...(networks && { networks }), ...(typeof vsock === 'object' && { vsock }) };
    const machine = await Machine.restore(snapshot, options);
    this.#made.push(machine);
    return { machine, ready: machine.resume() };
  }
}
