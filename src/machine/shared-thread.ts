import type { Worker } from 'node:worker_threads';
import { errnoName, TsvisorError } from '../errors.js';
import { addon } from '../kvm/addon.js';
import type { MachineThreadData, ThreadOrder } from './messages.js';
import type { ThreadLink } from './thread-link.js';
import { takeThread } from './warm-threads.js';

const RING = new Uint8Array(new BigUint64Array([1n]).buffer);

/**
 * A thread for the devices of many machines, in place of one for each: `Machine.restore(folder, { thread })`. A machine on
 * it takes about a megabyte beside its guest's memory instead of some ten, and is there sooner, since the thread has its
 * code already. Each vCPU has a native thread of its own, so an exit costs a hand-over. The machines share a fate: an
 * uncaught error of a user's device there ends them all, and a device that computes for long holds up the others. Modules
 * of users' devices are loaded once, and one that never ends loading is given up only with the thread. A machine with a page source cannot be on it.
 */
export class SharedThread implements AsyncDisposable {
  readonly #worker: Worker;
  readonly #doorbell: number;
  readonly #links = new Set<ThreadLink>();
  readonly #exited: Promise<void>;
  #failure: Error | undefined;

  constructor() {
    this.#doorbell = addon.eventfd(0);
    if (this.#doorbell < 0) throw new TsvisorError('ERR_INTERNAL', `eventfd: ${errnoName(-this.#doorbell)}`);
    const { worker, port } = takeThread();
    port.close(); // each machine has its own
    this.#worker = worker;
    worker.unref(); // without machines it does not keep the process
    worker.postMessage({ shared: this.#doorbell } satisfies ThreadOrder);
    worker.on('error', (error) => {
      this.#failure = error;
    });
    this.#exited = new Promise((resolve) => {
      worker.on('exit', (code) => {
        this.#failure ??= new Error(`it exited with code ${code}`);
        for (const link of this.#links) link.lost(this.#failure);
        addon.close(this.#doorbell);
        resolve();
      });
    });
  }

  /** Machines on it. */
  get machines(): number {
    return this.#links.size;
  }

  /** @internal A machine comes. */
  take(link: ThreadLink, order: MachineThreadData): void {
    if (this.#failure) {
      link.lost(this.#failure);
      return;
    }
    if (this.#links.size === 0) this.#worker.ref();
    this.#links.add(link);
    this.#worker.postMessage(order, [order.port]);
    addon.write(this.#doorbell, RING, 0, RING.length);
  }

  /** @internal The thread has done with a machine. */
  release(link: ThreadLink): void {
    if (this.#links.delete(link) && this.#links.size === 0) this.#worker.unref();
  }

  /** Ends the machines on it, then the thread. One that is still being made is given up. */
  async close(): Promise<void> {
    await Promise.all([...this.#links].filter(({ building }) => !building).map((link) => link.close()));
    await this.#worker.terminate();
    await this.#exited;
  }

  /** close(). */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
