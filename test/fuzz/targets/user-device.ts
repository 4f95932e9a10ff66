import { type Chain, VirtioDevice } from '#dist/device/index.js';
import { UserVirtio } from '#dist/machine/user-devices/virtio.js';
import type { Random } from '../../kvm/assist/random.js';
import { RecordingServices } from '../../support/devices/services.js';
import type { FuzzMachine, Memory } from '../machine.js';
import type { Request, Subject, Target } from '../target.js';

const QUEUE_SIZE = 16;
const MAX_REQUEST = 512;

/** Echoes some requests at once, and some when the program says so, however long ago they came. */
class Echo extends VirtioDevice {
  type = 42;
  queueSizes = [QUEUE_SIZE, QUEUE_SIZE];
  override config = new Uint8Array(8);
  readonly kept: { readonly chain: Chain; readonly bytes: Uint8Array }[] = [];
  #count = 0;

  handleQueue(index: number): void {
    const queue = this.queues[index];
    for (let chain = queue?.pop(); chain; chain = queue?.pop()) {
      const bytes = new Uint8Array(Math.min(chain.readable.length, MAX_REQUEST));
      chain.readable.read(0, bytes);
      if (this.#count++ % 3 > 0) this.kept.push({ chain, bytes });
      else queue?.push(chain, chain.writable.write(0, bytes));
    }
    queue?.publish();
    // What is kept of earlier drivers is worth nothing; some of it stays all the same.
    if (this.kept.length > 100) this.kept.splice(0, 50);
  }

  override save(): unknown {
    return { count: this.#count };
  }

  override restore(state: unknown): void {
    this.#count = Number((state as { count?: number } | null)?.count) || 0;
  }

  /** Gives a chain back, to the queue of that index, which need not be its own. */
  override onMessage(index: unknown): void {
    const kept = this.kept.shift();
    const queue = this.queues[Number(index)];
    if (!kept || !queue) return;
    const { chain, bytes } = kept;
    const written = chain.writable.write(0, bytes);
    try {
      queue.push(chain, written);
    } catch {
      this.queues[1 - Number(index)]?.push(chain, written);
    }
    for (const queue of this.queues) queue.publish();
  }
}

class UserDeviceSubject implements Subject {
  device: UserVirtio;
  readonly writableConfig = [0, 4];
  readonly #memory: Memory;
  #echo!: Echo;

  constructor(memory: Memory) {
    this.#memory = memory;
    this.device = this.renew();
  }

  renew(): UserVirtio {
    const host = new UserVirtio(0, 'echo', new RecordingServices());
    this.#echo = new Echo({ name: 'echo', options: undefined, host });
    host.adopt(this.#echo);
    host.powerOn({ memory: this.#memory.device, setInterrupt: () => {} });
    this.device = host;
    return host;
  }

  queue(random: Random): number {
    return random.below(2);
  }

  request(random: Random): Request {
    const out = new Uint8Array(random.below(random.chance(80) ? 40 : 2000));
    random.fill(out);
    return { out, in: random.below(random.chance(80) ? 40 : 2000) };
  }

  hostEvent(random: Random): string {
    this.device.receive(random.below(2));
    return 'the program answers';
  }

  settle(): boolean {
    this.device.receive(0);
    return this.#echo.kept.length > 0;
  }

  serves(): boolean {
    return true;
  }

  probe({ driver }: FuzzMachine): void {
    this.#echo.kept.length = 0;
    driver.initialize({ queueSizes: [8, 8] });
    for (let n = 0; n < 3; n++) driver.queues[0]?.send([Uint8Array.of(n, 1), 2]);
    while (this.settle());
    const done = driver.queues[0]?.completions() ?? [];
    const echoed = done.map(({ data }) => [...data].join()).sort();
    if (echoed.join(' ') !== '0,1 1,1 2,1') throw new Error(`echoed: ${echoed.join(' ')}`);
  }
}

export const userDevice: Target = {
  name: 'user-device',
  limits: { accesses: 4 * QUEUE_SIZE * QUEUE_SIZE * 8 + 10_000, bytes: 4 * QUEUE_SIZE * MAX_REQUEST + 10_000 },
  subject: (_random, memory) => new UserDeviceSubject(memory),
};
