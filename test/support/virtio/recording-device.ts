import type { DescriptorChain } from '#dist/virtio/chain.js';
import type { VirtioContext, VirtioModel } from '#dist/virtio/device.js';

export interface RecordingOptions {
  readonly queueSizes?: readonly number[];
  readonly features?: bigint;
  readonly config?: Uint8Array;
}

/** A device of no type that notes what its transport calls, and does what its test says. */
export class RecordingDevice implements VirtioModel {
  readonly name = 'test';
  readonly type = 42;
  readonly queueSizes: readonly number[];
  readonly features: bigint;
  readonly config: Uint8Array;
  readonly calls: string[] = [];
  acceptsFeatures?: (features: bigint) => boolean;
  /** Instead of using every chain at once. */
  onQueue: ((index: number) => void) | undefined;
  onActivate: (() => void) | undefined;
  onReset: (() => void) | undefined;
  #context: VirtioContext | undefined;

  constructor({ queueSizes = [8, 8], features = 0n, config = new Uint8Array() }: RecordingOptions = {}) {
    this.queueSizes = queueSizes;
    this.features = features;
    this.config = config;
  }

  /** The last one. */
  get context(): VirtioContext {
    if (!this.#context) throw new Error('the device was never activated');
    return this.#context;
  }

  readConfig(offset: number, out: Uint8Array): void {
    out.set(this.config.subarray(offset, offset + out.length));
  }

  writeConfig(offset: number, data: Uint8Array): void {
    this.calls.push(`write ${offset}: ${[...data].join(' ')}`);
  }

  activate(context: VirtioContext): void {
    this.calls.push('activate');
    this.#context = context;
    this.onActivate?.();
  }

  handleQueue(index: number): void {
    this.calls.push(`queue ${index}`);
    if (this.onQueue) this.onQueue(index);
    else this.useAll(index);
  }

  reset(): void {
    this.calls.push('reset');
    this.onReset?.();
  }

  useAll(index: number): void {
    const queue = this.context.queues[index];
    for (let chain = queue?.pop(); chain; chain = queue?.pop()) queue?.push(chain, 0);
    queue?.publish();
  }

  /** All chains of a queue, kept. */
  take(index: number): DescriptorChain[] {
    const chains: DescriptorChain[] = [];
    const queue = this.context.queues[index];
    for (let chain = queue?.pop(); chain; chain = queue?.pop()) chains.push(chain);
    return chains;
  }
}
