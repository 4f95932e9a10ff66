import { constants } from 'node:os';
import { expect } from 'vitest';
import { IoOperation, type IoRequest } from '#dist/backends/guest-io.js';
import { RWF_NOWAIT } from '#dist/virtio/generated/virtio.js';
import type { Segments } from '#dist/virtio/segments.js';

const { EAGAIN, ECANCELED } = constants.errno;

export interface Submitted {
  readonly what: string;
  readonly fd: number;
  readonly offset: number;
  readonly length: number;
  readonly request: IoRequest;
}

/** Native I/O whose results the test makes up. */
export class FakeIo {
  /** The only descriptor of which transfer() is used. */
  readonly fd: number;
  /** What transfer() finds; -EAGAIN when there is nothing left. */
  readonly atOnce: number[] = [];
  readonly transfers: number[] = [];
  readonly submitted: Submitted[] = [];

  constructor(fd: number) {
    this.fd = fd;
  }

  transfer(_: number, fd: number, offset: number, _segments: Segments, flags: number): number {
    expect([fd, flags]).toEqual([this.fd, RWF_NOWAIT]);
    this.transfers.push(offset);
    return this.atOnce.shift() ?? -EAGAIN;
  }

  submit(request: IoRequest, operation: number, fd: number, offset: number, length: number): void {
    const names = Object.entries(IoOperation).map(([name, number]) => [number, name]);
    this.submitted.push({ what: Object.fromEntries(names)[operation], fd, offset, length, request });
  }

  writeBytes(request: IoRequest, fd: number, offset: number, bytes: Uint8Array): void {
    this.submitted.push({ what: 'bytes', fd, offset, length: bytes.length, request });
  }

  copy(request: IoRequest, _from: number, _fromOffset: number, to: number, offset: number, length: number): void {
    this.submitted.push({ what: 'copy', fd: to, offset, length, request });
  }

  cancel(unwanted: (request: IoRequest) => boolean): void {
    for (const { request } of this.submitted.filter(({ request }) => unwanted(request))) this.end(-ECANCELED, request);
  }

  /** Ends the oldest, or the one of that request; all of it where the result is left out. */
  end(result?: number, request = this.submitted[0]?.request): void {
    const at = this.submitted.findIndex((one) => one.request === request);
    const [one] = this.submitted.splice(at, 1);
    one?.request.ioDone(result ?? (/read|write|bytes|copy/.test(one.what) ? one.length : 0));
  }

  /** What is under way, as "what fd@offset+length". */
  get list(): string[] {
    return this.submitted.map(({ what, fd, offset, length }) => `${what} ${fd}@${offset}+${length}`);
  }
}
