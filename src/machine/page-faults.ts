import { SnapshotError } from '../errors.js';
import { addon, type Mapping, type NativePageFaults } from '../kvm/addon.js';
import type { MachineEnd } from './end.js';
import type { HostServices } from './host-services.js';

/** The machine's ends of what leads to a page source. The descriptors are the main thread's; see addon/page_faults.h. */
export interface PageSourceLink {
  readonly uffd: number;
  readonly channel: number;
  readonly stop: number;
  /** Milliseconds that an answer may take. */
  readonly timeout: number;
  /** Whether all is asked for, after what is touched. */
  readonly prefetch: boolean;
}

/**
 * The machine thread's side of a page source. A thread of the addon serves the faults, also those of this thread: nothing
 * here is needed for that.
 */
export class PageFaults implements Disposable {
  readonly #host: Pick<HostServices, 'finish'>;
  readonly #lost = new Uint8Array(new ArrayBuffer(1));
  readonly #native: NativePageFaults;
  readonly #remove: () => void;
  #waiting: (() => void)[] = [];

  /** @param regions all of RAM in order, mapped and not touched; each with its offset. @throws SnapshotError */
  constructor(
    regions: readonly (readonly [offset: number, mapping: Mapping])[],
    { uffd, channel, stop, timeout, prefetch }: PageSourceLink,
    host: Pick<HostServices, 'finish' | 'events'>,
  ) {
    this.#host = host;
    try {
      const { source, remove } = host.events.addSource(
        () => this.#changed(),
        (runHost, token) => new addon.PageFaults(regions, uffd, channel, stop, timeout, this.#lost, runHost, token),
      );
      this.#native = source;
      this.#remove = remove;
    } catch (cause) {
      throw new SnapshotError(`snapshot: pages: this host cannot give them: ${(cause as Error).message}`, { cause });
    }
    if (prefetch) this.#native.fetch();
  }

  /** For after memory was read. @throws SnapshotError when what was read may not be what the guest wrote. */
  check(): void {
    if (Atomics.load(this.#lost, 0) === 0) return;
    const { message } = this.#end();
    throw new SnapshotError(`snapshot: ${message}`);
  }

  /** Calls back, now or later on this thread, when all of memory is there, for which all is asked for now. */
  whenWhole(callback: () => void): void {
    if (this.#native.missing === 0) {
      callback();
    } else {
      this.#waiting.push(callback);
      this.#native.fetch();
    }
  }

  [Symbol.dispose](): void {
    this.#waiting = [];
    this.#native.close();
    this.#remove();
  }

  #changed(): void {
    if (this.#native.missing > 0) {
      this.#end();
      return;
    }
    for (const callback of this.#waiting.splice(0)) callback();
  }

  /** The vCPU does not run any more. */
  #end(): MachineEnd {
    const why = this.#native.failure;
    const end: MachineEnd = why
      ? { reason: 'page-source-failure', code: null, message: `the page source failed: ${why}` }
      : { reason: 'stopped', code: null, message: 'the machine was stopped' };
    this.#host.finish(end);
    return end;
  }
}
