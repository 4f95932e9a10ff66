import { createRequire } from 'node:module';
import { TsvisorError } from '../errors.js';

/** Bytes for the kernel to read or write. */
export type Bytes = Uint8Array | DataView | BigUint64Array | Uint32Array | ArrayBuffer;

/** Pages mapped into this process, visible as an ArrayBuffer until unmap() detaches it. */
export interface Mapping {
  readonly buffer: ArrayBuffer;
  advise(advice: number): number;
  /** Writes pages to a file; see addon/mapping.h. @returns bytes written, or -errno. */
  savePages(fd: number, offset: number, pages?: Uint8Array): number;
  /** Maps a file copy-on-write in place of a part of it. @returns 0 or -errno. */
  mapOver(at: number, length: number, fd: number, offset: number): number;
  /** Puts private pages of zeros in place of all of it. @returns 0, or -errno: -EBUSY while something uses the pages. */
  renew(): number;
  unmap(): void;
}

/** The blocking primitive under a run loop; see addon/run_host.h. */
export interface RunHost {
  /** @param ownThread false: next() runs it, and it is the only one. @returns its index, from 0. */
  attachVcpu(vcpuFd: number, run: Mapping, ownThread: boolean): number;
  detachVcpu(index: number): void;
  /** false: they are all out of the guest when it returns. */
  setRunnable(indices: readonly number[], runnable: boolean): void;
  /** @param table of the rings that next() looks at while it spins; see addon/run_host.h. It is read at each call. */
  poll(table: Int32Array): void;
  /**
   * avail.idx of a virtqueue is at that offset; vCPUs notify of it by writing the 32-bit value at that guest physical address,
   * and do not stop for it. @returns the ring's index, from 0.
   */
  attachRing(
    memory: Mapping,
    offset: number,
    token: number,
    vcpus: readonly number[],
    gpa: number,
    value: number,
  ): number;
  detachRing(index: number): void;
  /** Asks once for an event; 0 or -errno. */
  watch(fd: number, token: number, events: number): number;
  unwatch(fd: number): number;
  /**
   * index << 8 | a KVM exit reason or RUN_FAILED, READY | token, or -errno: -EAGAIN when there is nothing, and also when
   * it would wait for longer than it spins: the drivers of polled rings are to notify first, and the table to be empty.
   * @param wait default true: until there is something.
   */
  next(wait?: boolean): number;
  /** errno of a vCPU's KVM_RUN that failed. */
  failure(index: number): number;
  /**
   * Lets KVM finish the instruction of the last exit without running the guest. @returns 0, an exit reason + 1 of an
   * instruction that needs another, or -errno: -ECANCELED of a vCPU that is not to run any more.
   */
  settle(index: number): number;
  close(): void;
}

/** Vectored I/O on guest memory; see addon/guest_io.h. */
export interface NativeGuestIo {
  transfer(): number;
  submit(
    token: number,
    operation: number,
    fd: number,
    offset: number,
    length: number,
    pairs: Float64Array,
    count: number,
    bytes?: Uint8Array,
  ): number;
  completions(into: Float64Array): number;
  cancel(tokens: Float64Array): void;
  close(): void;
}

/** Guest memory whose pages a source gives; see addon/page_faults.h. */
export interface NativePageFaults {
  fetch(): void;
  readonly missing: number;
  readonly failure: string | undefined;
  close(): void;
}

/** next() returned a watched descriptor's token in the low 16 bits. */
export const READY = 0x40000000;
/** In place of an exit reason: KVM_RUN failed. */
export const RUN_FAILED = 0xff;

/** The native addon: mechanism only. Calls return -errno where they can fail; addon/syscalls.cc says more of each. */
export interface Addon {
  ioctl(fd: number, request: number, argument?: number | Bytes, pointerOffset?: number, pointee?: Bytes): number;
  read(fd: number, into: Uint8Array, offset: number, count: number): number;
  write(fd: number, from: Uint8Array, offset: number, count: number): number;
  /**
   * Compares 16 aligned bytes with two words and replaces them by another two if they are equal, as one step for other
   * vCPUs too. @param words what is expected, then what is to be there; what was there is left in the first two.
   */
  compareExchange16(bytes: Uint8Array, words: BigUint64Array): boolean;
  timerfdCreate(): number;
  timerfdSet(fd: number, microseconds: number): number;
  open(path: string, flags: number): number;
  /** Takes an open-file-description lock, or tells whether it could be had; 0 or -errno, -EAGAIN where it could not. */
  ofdLock(fd: number, test: boolean, exclusive: boolean, start: number, length: number): number;
  /** Where a file has data from an offset on, or -errno: -ENXIO where only a hole is left. */
  seekData(fd: number, offset: number): number;
  /** Lets go of the locks of an open file description; 0 or -errno. */
  ofdUnlock(fd: number): number;
  close(fd: number): number;
  /** As close(), by another thread, for what takes long to close. */
  closeLater(fd: number): number;
  eventfd(initial: number): number;
  memfdCreate(name: string, size: number): number;
  socketpair(): [number, number] | number;
  /** Stops owning a descriptor: it belongs to a net.Socket or another thread now. */
  release(fd: number): boolean;
  /** Owns a descriptor that came from elsewhere. */
  adopt(fd: number): number;
  /** A descriptor for page faults of user and kernel, or -errno. */
  userfaultfd(): number;
  readonly Mapping: new (length: number, protection: number, flags: number, fd: number, offset: number) => Mapping;
  readonly RunHost: new () => RunHost;
  readonly GuestIo: new (
    regions: readonly (readonly [gpa: number, mapping: Mapping])[],
    host: RunHost,
    token: number,
    order: Float64Array,
  ) => NativeGuestIo;
  readonly PageFaults: new (
    regions: readonly (readonly [offset: number, mapping: Mapping])[],
    uffd: number,
    channel: number,
    stop: number,
    timeout: number,
    lost: Uint8Array,
    host: RunHost,
    token: number,
  ) => NativePageFaults;
}

const require = createRequire(import.meta.url);

function load(): Addon {
  try {
    return require('../../addon/build/Release/tsvisor.node');
  } catch (cause) {
    const remedy = 'run `npm rebuild tsvisor`, without --ignore-scripts';
    throw new TsvisorError('ERR_BUILD', `the native addon is not compiled for this host; ${remedy}`, { cause });
  }
}

export const addon: Addon = load();
