import { constants } from 'node:os';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { Segments } from '../../virtio/segments.js';
import type { IoOperation, IoRequest } from '../guest-io.js';
import type { HostFile } from './host-file.js';

const { ECANCELED, EINVAL, EIO } = constants.errno;

/** A thread moves so many bytes at a time, so that cancelling takes effect soon. */
const MAX_PIECE = 4 * 1024 * 1024;

export type Move = typeof IoOperation.read | typeof IoOperation.write;

/** A read or write of a HostFile that goes on, on a thread, until all is moved. Reused. */
export class Transfer implements IoRequest {
  operation: Move = 0;
  direct = false;
  readonly #file: HostFile;
  readonly #piece: Segments;
  #whole: Segments | undefined;
  #offset = 0;
  #done = 0;
  #canceled = false;
  #request: IoRequest | undefined;

  constructor(file: HostFile, memory: GuestMemory) {
    this.#file = file;
    this.#piece = new Segments(memory);
  }

  /** @param done bytes that were moved already. */
  start(operation: Move, offset: number, whole: Segments, done: number, direct: boolean, request: IoRequest): void {
    this.operation = operation;
    this.direct = direct;
    this.#whole = whole;
    this.#offset = offset;
    this.#done = done;
    this.#canceled = false;
    this.#request = request;
    this.#next(whole);
  }

  /** @returns whether it is of that file, and so will move nothing more. */
  cancel(file: HostFile): boolean {
    if (file !== this.#file) return false;
    this.#canceled = true;
    return true;
  }

  ioDone(result: number): void {
    const whole = this.#whole as Segments;
    if (result === -EINVAL && this.direct) {
      this.#file.wantMoreAlignment();
      this.direct = false; // the page cache takes any alignment
      this.#next(whole);
    } else if (result <= 0) {
      this.#finish(result || -EIO); // somebody made the file shorter
    } else {
      this.#done += result;
      if (this.#done >= whole.length) this.#finish(0);
      else if (this.#canceled) this.#finish(-ECANCELED);
      else this.#next(whole);
    }
  }

  #next(whole: Segments): void {
    this.#piece.cut(whole, this.#done, MAX_PIECE);
    this.#file.submit(this, this.#offset + this.#done, this.#piece);
  }

  #finish(result: number): void {
    const request = this.#request as IoRequest;
    this.#whole = this.#request = undefined;
    this.#file.release(this);
    request.ioDone(result);
  }
}
