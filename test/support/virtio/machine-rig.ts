import { GuestIo } from '#dist/backends/guest-io.js';
import { addon } from '#dist/kvm/addon.js';
import { EPOLLIN } from '#dist/kvm/generated/abi.js';
import { FdEvents, Timer } from '#dist/machine/fd-events.js';
import { mockMemory } from './mock-driver.js';

const ONE = new Uint8Array(new BigUint64Array([1n]).buffer);

/** A machine's thread without a vCPU: its descriptors, timers and guest RAM. */
export class MachineRig implements Disposable {
  readonly #host = new addon.RunHost();
  readonly events = new FdEvents(this.#host);
  readonly memory: ReturnType<typeof mockMemory>['memory'];
  readonly io: GuestIo;
  readonly #doorbell = addon.eventfd(0);
  readonly #ring: (events: number) => void;
  readonly #timers: Timer[] = [];
  #rung = false;

  constructor() {
    const { mapping, memory } = mockMemory(32 << 20);
    this.memory = memory;
    this.io = new GuestIo([[0, mapping]], memory, this.events);
    this.#ring = this.events.add(this.#doorbell, () => {
      addon.read(this.#doorbell, new Uint8Array(8), 0, 8);
      this.#rung = true;
    });
  }

  /** For a device. */
  readonly timer = (onExpired: () => void): Timer => {
    const timer = new Timer(this.events, onExpired);
    this.#timers.push(timer);
    return timer;
  };

  /** Handles what is ready now. */
  pump(): void {
    this.#rung = false;
    this.#ring(EPOLLIN);
    addon.write(this.#doorbell, ONE, 0, ONE.length);
    while (!this.#rung) this.events.dispatch(this.#host.next() & 0xffff);
  }

  /** Handles events until something is so. */
  async until(what: () => boolean): Promise<void> {
    for (const end = Date.now() + 60_000; !what(); ) {
      if (Date.now() > end) throw new Error(`it never came to be that ${what}`);
      this.pump();
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  [Symbol.dispose](): void {
    for (const timer of this.#timers) timer.close();
    this.io[Symbol.dispose]();
    this.#host.close();
    addon.close(this.#doorbell);
  }
}
