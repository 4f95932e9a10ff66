import { readSync, writeSync } from 'node:fs';
import koffi from 'koffi';
import { GuestIo, IoOperation, type IoRequest } from '#dist/backends/guest-io.js';
import { addon, type RunHost } from '#dist/kvm/addon.js';
import { FdEvents } from '#dist/machine/fd-events.js';
import { Segments } from '#dist/virtio/segments.js';
import type { Random } from '../kvm/assist/random.js';
import type { Memory } from './machine.js';

const ECANCELED = 125;
const FAILURES = [-5 /* EIO */, -28 /* ENOSPC */, -ECANCELED];

const setsockopt = koffi.load('libc.so.6').func('int setsockopt(int, int, int, const void *, unsigned int)');
const SOL_SOCKET = 1;
const SO_SNDBUF = 7;

/** A socket for the device and its other end. @param small with as little room as the kernel gives. */
export function sockets(small: boolean): { readonly device: number; readonly host: number } {
  const [device, host] = addon.socketpair() as [number, number];
  if (small) setsockopt(device, SOL_SOCKET, SO_SNDBUF, Uint8Array.of(1, 0, 0, 0), 4);
  return { device, host };
}

/** Events of descriptors that come when the fuzzer says so, whatever the descriptors' state: that is allowed. */
export class ManualEvents {
  readonly events: FdEvents;
  /** Tokens of descriptors that are waited for. */
  readonly #armed = new Map<number, number>();

  constructor() {
    const host: RunHost = {
      attachVcpu: () => 0,
      detachVcpu: () => {},
      setRunnable: () => {},
      poll: () => {},
      attachRing: () => 0,
      detachRing: () => {},
      watch: (fd, token) => {
        this.#armed.set(fd, token);
        return 0;
      },
      unwatch: (fd) => (this.#armed.delete(fd) ? 0 : -2),
      next: () => -9,
      failure: () => 9,
      settle: () => -9,
      close: () => {},
    };
    this.events = new FdEvents(host);
  }

  /** One event of a descriptor that is waited for: any, or the first. @returns whether there was one. */
  fire(random?: Random): boolean {
    const armed = [...this.#armed.keys()];
    if (armed.length === 0) return false;
    const fd = random ? random.pick(armed) : (armed[0] as number);
    const token = this.#armed.get(fd) as number;
    this.#armed.delete(fd);
    this.events.dispatch(token);
    return true;
  }
}

/** What the cases of a target share, made anew for another memory. */
export class PerMemory<T extends Disposable> {
  readonly #make: (memory: Memory) => T;
  #memory: Memory | undefined;
  #value: T | undefined;

  constructor(make: (memory: Memory) => T) {
    this.#make = make;
  }

  get(memory: Memory): T {
    if (this.#memory !== memory || !this.#value) {
      this.dispose();
      this.#memory = memory;
      this.#value = this.#make(memory);
    }
    return this.#value;
  }

  dispose(): void {
    this.#value?.[Symbol.dispose]();
    this.#value = this.#memory = undefined;
  }
}

/** A one-shot timer that expires when the fuzzer says so. */
export class ManualTimer {
  armed = false;
  #expired: () => void = () => {};

  readonly make = (onExpired: () => void) => {
    this.#expired = onExpired;
    return {
      arm: (microseconds: number) => {
        if (!(microseconds >= 1 && microseconds < 2 ** 32)) throw new RangeError(`a timer of ${microseconds} µs`);
        this.armed = true;
      },
    };
  };

  fire(): void {
    this.armed = false;
    this.#expired();
  }
}

/** A change of a file that an operation is to make. */
export interface Change {
  readonly fd: number;
  readonly offset: number;
  readonly length: number;
}

interface Job {
  readonly request: IoRequest;
  readonly run: () => number;
  canceled: boolean;
}

/** Guest I/O whose operations are done one by one, in any order, when the fuzzer says so. */
export class ManualIo extends GuestIo {
  /** Whether operations fail now and then. */
  failing = false;
  /** Called when an operation that changes a file is asked for. */
  onChange: (change: Change) => void = () => {};
  /** Called for every piece of guest memory that is to be stored to, or read. */
  onMemory: (gpa: number, length: number, stored: boolean) => void = () => {};
  readonly #memory: Memory;
  readonly #jobs: Job[] = [];
  readonly #listeners: (() => void)[] = [];

  readonly #host: RunHost;

  constructor(memory: Memory) {
    const host = new addon.RunHost();
    super(memory.regions, memory.guest, new FdEvents(host));
    this.#host = host;
    this.#memory = memory;
  }

  override [Symbol.dispose](): void {
    super[Symbol.dispose]();
    this.#host.close();
  }

  /** Forgets all that was of another case. */
  clear(): void {
    this.#jobs.length = this.#listeners.length = 0;
  }

  override get pending(): number {
    return this.#jobs.length;
  }

  override onBatch(listener: () => void): void {
    this.#listeners.push(listener);
  }

  override transfer(...[operation, fd, offset, segments, flags, prefix]: Parameters<GuestIo['transfer']>): number {
    this.#checkMemory(operation, segments);
    if (operation === IoOperation.write) this.onChange({ fd, offset, length: segments.length });
    return super.transfer(operation, fd, offset, segments, flags, prefix);
  }

  override submit(
    request: IoRequest,
    operation: IoOperation,
    fd: number,
    offset: number,
    length: number,
    segments?: Segments,
  ): void {
    if (operation === IoOperation.flush) {
      this.#add(request, () => 0);
    } else if (
      operation === IoOperation.read ||
      operation === IoOperation.write ||
      operation === IoOperation.directWrite
    ) {
      if (!segments) throw new Error('no segments');
      this.#checkMemory(operation, segments);
      if (operation !== IoOperation.read) this.onChange({ fd, offset, length: segments.length });
      const copy = new Segments(this.#memory.guest);
      copy.cut(segments, 0, segments.length);
      const move = operation === IoOperation.read ? operation : IoOperation.write;
      this.#add(request, () => super.transfer(move, fd, offset, copy, 0));
    } else {
      this.onChange({ fd, offset, length });
      this.#add(request, () => this.#write(fd, offset, new Uint8Array(length)) && 0);
    }
  }

  override writeBytes(request: IoRequest, fd: number, offset: number, bytes: Uint8Array): void {
    this.onChange({ fd, offset, length: bytes.length });
    const copy = bytes.slice();
    this.#add(request, () => this.#write(fd, offset, copy));
  }

  override copy(
    request: IoRequest,
    from: number,
    fromOffset: number,
    to: number,
    offset: number,
    length: number,
  ): void {
    this.onChange({ fd: to, offset, length });
    this.#add(request, () => this.#write(to, offset, this.#read(from, fromOffset, length)));
  }

  override cancel(unwanted: (request: IoRequest) => boolean): void {
    for (const job of this.#jobs) if (unwanted(job.request)) job.canceled = true;
  }

  /** Ends some operations; of those that were canceled some had begun. @returns how many. */
  finishSome(random: Random, most: number): number {
    const count = Math.min(this.#jobs.length, most);
    for (let n = count; n > 0; n--) {
      const [job] = this.#jobs.splice(random.below(this.#jobs.length), 1) as [Job];
      let result: number;
      if (job.canceled && random.chance(70)) result = -ECANCELED;
      else if (this.failing && random.chance(15)) result = random.pick(FAILURES);
      else result = job.run();
      job.request.ioDone(result);
    }
    for (const listener of this.#listeners) listener();
    return count;
  }

  /** Ends all, and what comes of that, in their order. */
  finishAll(): void {
    for (let job = this.#jobs.shift(); job; job = this.#jobs.shift()) job.request.ioDone(job.run());
    for (const listener of this.#listeners) listener();
  }

  #checkMemory(operation: number, { pairs, count }: Segments): void {
    for (let i = 0; i < 2 * count; i += 2) {
      this.onMemory(pairs[i] as number, pairs[i + 1] as number, operation === IoOperation.read);
    }
  }

  #add(request: IoRequest, run: () => number): void {
    this.#jobs.push({ request, run, canceled: false });
  }

  /** By the fuzzer's own hand, so that nothing depends on threads. */
  #write(fd: number, offset: number, bytes: Uint8Array): number {
    return bytes.length === 0 ? 0 : writeSync(fd, bytes, 0, bytes.length, offset);
  }

  #read(fd: number, offset: number, length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    return bytes.subarray(0, length === 0 ? 0 : readSync(fd, bytes, 0, length, offset));
  }
}
