import type { DescriptorChain } from '#dist/virtio/chain.js';
import type { VirtioContext, VirtioModel } from '#dist/virtio/device.js';
import type { Virtqueue } from '#dist/virtio/queue.js';
import { Segments } from '#dist/virtio/segments.js';
import { Random } from '../../kvm/assist/random.js';
import type { FuzzMachine } from '../machine.js';
import type { Request, Subject, Target } from '../target.js';

const SHAPES = [[1], [16], [256], [2, 64], [64, 8, 32]];
const NOISE = new Random(1).fill(new Uint8Array(5000));
const scratch = new Uint8Array(3000);

/** A device that does with its queues whatever a device may do, and resets itself from inside now and then. */
class AnyDevice implements VirtioModel {
  readonly name = 'any';
  readonly type = 42;
  readonly queueSizes: readonly number[];
  readonly features: bigint;
  machine: FuzzMachine | undefined;
  /** A well-behaved driver is served at once. */
  plain = false;
  readonly #random: Random;
  readonly #held: { readonly chain: DescriptorChain; readonly queue: Virtqueue }[] = [];
  #context: VirtioContext | undefined;
  #part: Segments | undefined;
  #depth = 0;
  #accepts = false;

  constructor(random: Random) {
    this.#random = random;
    scratch.fill(0); // every case starts alike
    this.queueSizes = random.pick(SHAPES);
    this.features = random.u64() & 0xff_ffffn;
  }

  acceptsFeatures(): boolean {
    return this.plain || this.#accepts || this.#random.chance(90);
  }

  readConfig(offset: number, out: Uint8Array): void {
    for (let i = 0; i < out.length && offset + i < 40; i++) out[i] = offset + i;
  }

  writeConfig(): void {}

  activate(context: VirtioContext): void {
    this.#context = context;
    this.#part = new Segments(context.memory);
    this.#meddle();
  }

  reset(): void {
    this.#context = undefined;
    this.#held.length = 0;
  }

  handleQueue(index: number): void {
    const queue = this.#context?.queues[index];
    if (!queue || this.#depth > 2) return;
    this.#depth++;
    const random = this.#random;
    for (let left = this.plain || random.chance(60) ? Number.POSITIVE_INFINITY : random.below(4); left > 0; left--) {
      const chain = queue.pop();
      if (!chain) break;
      if (!this.plain && random.chance(10)) {
        queue.unpop(chain);
        break;
      }
      if (!this.plain && random.chance(30)) this.#held.push({ chain, queue });
      else this.#use(queue, chain);
      this.#meddle();
    }
    if (this.plain || random.chance(90)) queue.publish();
    this.#depth--;
  }

  /** Chains that it kept, in any order. */
  finishSome(): void {
    const random = this.#random;
    const queues = new Set<Virtqueue>();
    for (let n = random.below(6); n > 0 && this.#held.length > 0; n--) {
      const [held] = this.#held.splice(random.below(this.#held.length), 1);
      if (!held?.queue.alive) continue;
      this.#use(held.queue, held.chain);
      queues.add(held.queue);
    }
    for (const queue of queues) if (random.chance(90)) queue.publish();
  }

  /** All that it kept and all that waits. */
  finishAll(): void {
    this.plain = true;
    for (const { queue, chain } of this.#held.splice(0)) this.#use(queue, chain);
    for (let index = 0; index < this.queueSizes.length; index++) this.handleQueue(index);
  }

  #use(queue: Virtqueue, chain: DescriptorChain): void {
    if (!queue.alive) return;
    const random = this.#random;
    const { readable, writable } = chain;
    const bytes = scratch.subarray(0, random.below(scratch.length));
    let written = 0;
    switch (random.below(4)) {
      case 0:
        readable.read(random.below(64), bytes);
        break;
      case 1:
        written = writable.write(0, bytes.fill(random.u32()));
        break;
      case 2: {
        const part = this.#part as Segments;
        part.cut(readable, random.below(64), random.below(4096));
        part.read(0, bytes);
        part.cut(writable, random.below(64), random.below(4096));
        part.write(0, bytes);
        break;
      }
      default:
        if (writable.length > 0x2_0000) break;
        writable.zero(random.below(32));
        written = writable.length;
    }
    queue.push(chain, written);
  }

  /** The device's own mind, or a driver on another vCPU. */
  #meddle(): void {
    const random = this.#random;
    const driver = this.machine?.driver;
    if (!driver || this.plain || !random.chance(2)) return;
    switch (random.below(6)) {
      case 0:
        this.#context?.fail('it does not want to');
        break;
      case 1:
        this.#context?.configChanged();
        break;
      case 2:
        driver.status = 0;
        break;
      case 3:
        driver.write32(0x50, random.below(4)); // QueueNotify
        break;
      case 4:
        driver.acknowledge();
        break;
      default:
        this.#accepts = true;
        driver.initialize({ queueSizes: this.queueSizes.map(() => 1) });
        this.#accepts = false;
    }
  }
}

class QueueSubject implements Subject {
  readonly device: AnyDevice;

  constructor(random: Random) {
    this.device = new AnyDevice(random);
  }

  attach(machine: FuzzMachine, lawful: boolean): void {
    this.device.machine = lawful ? undefined : machine; // it meddles with nothing else
  }

  settle(): boolean {
    this.device.finishAll();
    return false;
  }

  serves(): boolean {
    return true;
  }

  queue(random: Random): number {
    return random.below(this.device.queueSizes.length);
  }

  request(random: Random): Request {
    return {
      out: NOISE.subarray(0, random.chance(80) ? random.below(100) : random.below(NOISE.length)),
      in: random.chance(80) ? random.below(100) : random.below(0x1_0000),
    };
  }

  hostEvent(): string {
    this.device.finishSome();
    return 'the device goes on';
  }

  probe({ driver }: FuzzMachine): void {
    this.device.plain = true;
    driver.initialize({ queueSizes: this.device.queueSizes.map((size) => Math.min(size, 8)) });
    for (const queue of driver.queues) queue.request([Uint8Array.of(1, 2), 3]);
  }
}

/** Queues and the transport alone. */
export const queue: Target = {
  name: 'queue',
  limits: { accesses: 1_000_000, bytes: 64 << 20 },
  subject: (random) => new QueueSubject(random),
};
