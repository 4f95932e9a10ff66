import type { Mapping, RunHost } from '../kvm/addon.js';
import { VIRTIO_MMIO_QUEUE_NOTIFY } from '../virtio/generated/virtio.js';
import type { PolledQueue, QueuePolling, RingPoll } from '../virtio/queue.js';
import type { FdEvents } from './fd-events.js';
import type { RunLoop } from './run-loop.js';

/** Rings that are looked at at a time; the drivers of others notify. */
const CAPACITY = 32;

/**
 * The rings that a machine thread looks at while it waits, in place of notifications, each of which would stop a vCPU:
 * those whose devices have found them empty since it last slept. Before it sleeps again, it asks their drivers to notify.
 */
export class PolledRings {
  /** RunHost.poll()'s: how many, then of each its index and the avail.idx that its device has seen. */
  readonly #table = new Int32Array(1 + 2 * CAPACITY);
  /** In the order of the table; one that has moved goes to the end, so that none keeps others from being seen. */
  readonly #rings: MachineRing[] = [];

  constructor(host: RunHost) {
    host.poll(this.#table);
  }

  /** @returns false: there is no place for it. */
  add(ring: MachineRing, seen: number): boolean {
    let place = this.#rings.indexOf(ring);
    if (place < 0) {
      if (this.#rings.length === CAPACITY) return false;
      place = this.#rings.push(ring) - 1;
    }
    this.#table[1 + 2 * place] = ring.index;
    this.#table[2 + 2 * place] = seen;
    this.#table[0] = this.#rings.length;
    return true;
  }

  /** @returns what it was: whether it was there, and whether next() has told that it has moved. */
  remove(ring: MachineRing): 'absent' | 'polled' | 'moved' {
    const place = this.#rings.indexOf(ring);
    if (place < 0) return 'absent';
    const moved = (this.#table[2 + 2 * place] as number) < 0;
    this.#rings.copyWithin(place, place + 1).pop(); // splice() would allocate
    this.#table.copyWithin(1 + 2 * place, 3 + 2 * place);
    this.#table[0] = this.#rings.length;
    return moved ? 'moved' : 'polled';
  }

  /** Empties it. @param moved called with the token of each that has something its driver will not notify of. */
  rest(moved: (token: number) => void): void {
    // Those that their devices look at meanwhile come anew.
    for (let count = this.#rings.length; count > 0; count--) {
      const ring = this.#rings[0];
      if (!ring) return;
      this.remove(ring);
      if (asksDriver(ring)) moved(ring.token);
    }
  }
}

/** One machine's: they are polled while its vCPUs run. */
export class MachineRings {
  readonly #loop: RunLoop;
  readonly #events: FdEvents;
  readonly #vcpus: readonly number[];
  readonly #rings = new Set<MachineRing>();
  /** Those that had something when the vCPUs stopped: nobody has looked at it. */
  readonly #moved = new Set<MachineRing>();
  #regions: readonly (readonly [gpa: number, mapping: Mapping])[] = [];
  #running = false;

  /** @param vcpus of the RunHost; there when queues are. */
  constructor(loop: RunLoop, events: FdEvents, vcpus: readonly number[]) {
    this.#loop = loop;
    this.#events = events;
    this.#vcpus = vcpus;
  }

  /** The guest is powered on. @param regions its memory. */
  powerOn(regions: readonly (readonly [gpa: number, mapping: Mapping])[]): void {
    this.#regions = regions;
  }

  powerOff(): void {
    for (const ring of this.#rings) ring.close();
    this.#regions = [];
  }

  /** The vCPUs are about to run, or have stopped: from then on nothing is polled, nor written to the guest's memory. */
  setRunning(running: boolean): void {
    if (running === this.#running) return;
    this.#running = running;
    if (running) {
      for (const { token } of this.#moved) this.#loop.raise(token);
      this.#moved.clear();
      return;
    }
    for (const ring of this.#rings) {
      const state = this.#loop.polled.remove(ring);
      if (state !== 'absent' && asksDriver(ring)) this.#moved.add(ring);
    }
  }

  /** @param base guest physical address of the device's registers. */
  ofDevice(base: number): QueuePolling {
    const notify = base + VIRTIO_MMIO_QUEUE_NOTIFY;
    return { attach: (number, index, client) => this.#attach(number, index, client, notify) };
  }

  #attach(number: number, index: number, client: PolledQueue, notify: number): RingPoll | undefined {
    const region = this.#regions.find(([gpa, { buffer }]) => index >= gpa && index < gpa + buffer.byteLength);
    if (!region) return undefined;
    const [gpa, mapping] = region;
    const { host, polled } = this.#loop;
    let open = true;
    let token = 0;
    const { source, remove } = this.#events.addSource(
      () => {
        const moved = polled.remove(ring) === 'moved';
        if (this.#running) client.work(moved);
        else this.#moved.add(ring);
      },
      (_, allocated) => {
        token = allocated;
        return host.attachRing(mapping, index - gpa, token, this.#vcpus, notify, number);
      },
    );
    const ring: MachineRing = {
      client,
      token,
      index: source,
      await: (seen) => open && this.#running && polled.add(ring, seen),
      close: () => {
        if (!open) return;
        open = false;
        this.#rings.delete(ring);
        this.#moved.delete(ring);
        polled.remove(ring);
        host.detachRing(source);
        remove();
      },
    };
    this.#rings.add(ring);
    return ring;
  }
}

/** awaitNotification(); its device is to meet what that throws. */
function asksDriver({ client }: MachineRing): boolean {
  try {
    return client.awaitNotification();
  } catch {
    return true;
  }
}

/** A queue's, while it is served. */
interface MachineRing extends RingPoll {
  readonly client: PolledQueue;
  readonly token: number;
  /** Of the RunHost. */
  readonly index: number;
}
