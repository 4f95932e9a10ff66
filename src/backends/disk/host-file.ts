import { closeSync } from 'node:fs';
import { constants } from 'node:os';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { RWF_NOWAIT } from '../../virtio/generated/virtio.js';
import type { Segments } from '../../virtio/segments.js';
import { type GuestIo, IoOperation, type IoRequest } from '../guest-io.js';
import { PENDING } from './disk.js';
import { type Move, Transfer } from './transfer.js';

const { EAGAIN, ECANCELED, EOPNOTSUPP } = constants.errno;

/** What is tried at once, without a thread, in bytes: a page-cache copy of this takes well under 0.1 ms. */
export const MAX_INLINE = 256 * 1024;
/** What memory, offset and length of O_DIRECT must be multiples of, at first. Some hosts want more. */
const DIRECT_ALIGNMENT = 512;
const MAX_DIRECT_ALIGNMENT = 4096;

/**
 * I/O of one host file or block device. What the page cache can do at once is done at once, the rest on a thread of
 * GuestIo. Threads and not io_uring: a hit in the page cache needs neither, and many containers refuse io_uring.
 */
export class HostFile {
  readonly fd: number;
  /** The same file opened with O_DIRECT; -1 when all goes through the page cache. */
  readonly #directFd: number;
  #directAlignment = DIRECT_ALIGNMENT;
  #machine: { io: GuestIo; memory: GuestMemory } | undefined;
  #free: Transfer[] = [];
  /** By operation, whether RWF_NOWAIT is worth a try: of page-cache I/O, ext4 has it for reads alone and tmpfs not at all. */
  readonly #inline: [read: boolean, write: boolean] = [true, true];
  #canPunch = true;
  #flushError = 0;

  /** Owns the descriptors. */
  constructor(fd: number, directFd = -1) {
    this.fd = fd;
    this.#directFd = directFd;
  }

  /** Begins a power-on. */
  attach(io: GuestIo, memory: GuestMemory): void {
    this.#machine = { io, memory };
    this.#free = [];
  }

  /** Operations are as Disk's. @param atOnce whether to try without a thread. */
  read(offset: number, into: Segments, request: IoRequest, atOnce = true): number {
    return this.#move(IoOperation.read, offset, into, request, atOnce);
  }

  write(offset: number, from: Segments, request: IoRequest): number {
    return this.#move(IoOperation.write, offset, from, request, true);
  }

  /** What every flush ends with; 0 while none has failed. */
  get flushError(): number {
    return this.#flushError;
  }

  /**
   * fdatasync. Once it has failed it always fails: the kernel reports a lost write a single time, and a later success
   * says nothing of it.
   */
  flush(request: IoRequest): number {
    if (this.#flushError) return this.#flushError;
    const done = (result: number): void => {
      if (result < 0 && result !== -ECANCELED) this.#flushError = result;
      request.ioDone(result);
    };
    this.io.submit({ ioDone: done }, IoOperation.flush, this.fd, 0, 0);
    return PENDING;
  }

  /** Gives blocks back to the host where it can; the range then reads as zeros. */
  discard(offset: number, length: number, request: IoRequest): number {
    return this.#canPunch ? this.#punch(offset, length, request, () => 0) : 0;
  }

  zero(offset: number, length: number, unmap: boolean, request: IoRequest): number {
    const zeroRange = (): number => {
      this.io.submit(request, IoOperation.zeroRange, this.fd, offset, length);
      return PENDING;
    };
    return unmap && this.#canPunch ? this.#punch(offset, length, request, zeroRange) : zeroRange();
  }

  /** Reads and writes that no thread has begun end with -ECANCELED. */
  cancel(): void {
    this.io.cancel((request) => request instanceof Transfer && request.cancel(this));
  }

  close(): void {
    for (const fd of [this.fd, this.#directFd]) if (fd >= 0) closeSync(fd);
  }

  /** Of this power-on. */
  get io(): GuestIo {
    return this.#attached.io;
  }

  /** Starts what is left of a transfer on a thread. */
  submit(transfer: Transfer, offset: number, segments: Segments): void {
    const { operation, direct } = transfer;
    const how = direct && operation === IoOperation.write ? IoOperation.directWrite : operation;
    this.io.submit(transfer, how, direct ? this.#directFd : this.fd, offset, segments.length, segments);
  }

  /** The host refused alignment that is enough elsewhere. */
  wantMoreAlignment(): void {
    this.#directAlignment = MAX_DIRECT_ALIGNMENT;
  }

  /** @param otherwise what to do where the host cannot give blocks back. */
  #punch(offset: number, length: number, request: IoRequest, otherwise: () => number): number {
    const ioDone = (result: number): void => {
      if (result === -EOPNOTSUPP) this.#canPunch = false;
      const outcome = result === -EOPNOTSUPP ? otherwise() : result;
      if (outcome !== PENDING) request.ioDone(outcome);
    };
    this.io.submit({ ioDone }, IoOperation.punchHole, this.fd, offset, length);
    return PENDING;
  }

  /** A transfer is over. */
  release(transfer: Transfer): void {
    this.#free.push(transfer);
  }

  get #attached(): { io: GuestIo; memory: GuestMemory } {
    if (!this.#machine) throw new Error('a disk of no machine');
    return this.#machine;
  }

  #move(operation: Move, offset: number, segments: Segments, request: IoRequest, atOnce: boolean): number {
    if (segments.length === 0) return 0;
    const direct = this.#directFd >= 0 && aligned(offset, segments, this.#directAlignment);
    let done = 0;
    // O_DIRECT waits for the disk whatever the flags say.
    if (atOnce && !direct && this.#inline[operation] && segments.length <= MAX_INLINE) {
      const result = this.io.transfer(operation, this.fd, offset, segments, RWF_NOWAIT);
      if (result === segments.length) return 0;
      if (result === -EOPNOTSUPP) this.#inline[operation] = false;
      else if (result < 0 && result !== -EAGAIN) return result;
      else if (result > 0) done = result;
    }
    const transfer = this.#free.pop() ?? new Transfer(this, this.#attached.memory);
    transfer.start(operation, offset, segments, done, direct, request);
    return PENDING;
  }
}

function aligned(offset: number, { pairs, count }: Segments, alignment: number): boolean {
  if (offset % alignment !== 0) return false;
  for (let i = 0; i < 2 * count; i++) if ((pairs[i] as number) % alignment !== 0) return false;
  return true;
}
