import type { GuestMemory } from '../../memory/guest-memory.js';
import type { Segments } from '../../virtio/segments.js';
import type { GuestIo, IoRequest } from '../guest-io.js';

/** The operation goes on: its request's ioDone() is called later, with 0 or -errno. */
export const PENDING = 1;

/**
 * A drive's contents. Operations return 0 when done, -errno when failed, or PENDING. Ranges lie within the size; whoever
 * asks has checked that. Segments stay as they are until the operation is done. A disk outlives a guest's reset.
 */
export interface Disk {
  /** For messages. */
  readonly path: string;
  /** Bytes; a multiple of 512. */
  readonly size: number;
  readonly readOnly: boolean;
  /** Bytes that are best read and written at a time: a power of two, 512 or more; the second is a multiple of the first. */
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  /** Begins a power-on: what was under way in the one before is forgotten. */
  attach(io: GuestIo, memory: GuestMemory): void;
  /** @param offset bytes. */
  read(offset: number, into: Segments, request: IoRequest): number;
  write(offset: number, from: Segments, request: IoRequest): number;
  /** Makes every write that is done durable. */
  flush(request: IoRequest): number;
  /** As flush(), for a snapshot: afterwards the disk's files have all that was written, also where flushes do nothing. */
  sync(request: IoRequest): number;
  /** The range's contents are of no use any more: they may stay, or read as zeros. */
  discard(offset: number, length: number, request: IoRequest): number;
  /** The range reads as zeros from now on. @param unmap its blocks may be given back to the host. */
  zero(offset: number, length: number, unmap: boolean, request: IoRequest): number;
  /** What is under way ends soon, with -ECANCELED where it has not begun. */
  cancel(): void;
  /**
   * Nothing is under way: lets another process have the disk. Its contents are in its files; nothing is asked of it until
   * takeBack(). @throws DriveError when its contents could not be written; it is still this machine's then.
   */
  handOver(): void;
  /** Undoes handOver(), after which nobody else has written it. @throws DriveError while another process has it. */
  takeBack(): void;
  /** Nothing is under way any more. Makes durable what the guest would find at its next boot. @throws DriveError */
  close(): void;
}
