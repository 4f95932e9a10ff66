import type { GuestIo } from '#dist/backends/guest-io.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import type { NetBackend, SendResult } from '#dist/virtio/net/backend.js';
import { Net } from '#dist/virtio/net/net.js';
import type { Segments } from '#dist/virtio/segments.js';
import { MachineRig } from '../../support/virtio/machine-rig.js';
import { type DriverOptions, MockDriver } from '../../support/virtio/mock-driver.js';

export const MAC = Uint8Array.of(0x52, 0x54, 0, 0x12, 0x34, 0x56);
export const RX = 0;
export const TX = 1;

/** A machine's thread with a network device. */
export class NetRig extends MachineRig {
  device(backend: NetBackend): Net {
    return new Net({ name: 'net0', mac: MAC, backend, io: this.io, timer: this.timer });
  }

  driver(backend: NetBackend, options: DriverOptions = {}): { net: Net; driver: MockDriver } {
    const net = this.device(backend);
    return { net, driver: MockDriver.ready(net, options, this.memory) };
  }
}

export interface Header {
  readonly flags?: number;
  readonly gsoType?: number;
  readonly hdrLen?: number;
  readonly gsoSize?: number;
  readonly csumStart?: number;
  readonly csumOffset?: number;
  readonly numBuffers?: number;
}

/** A virtio_net_hdr_v1. */
export function header(fields: Header = {}): Uint8Array {
  const at = abi.virtio_net_hdr_v1;
  const view = new DataView(new ArrayBuffer(at.sizeof));
  view.setUint8(at.flags, fields.flags ?? 0);
  view.setUint8(at.gso_type, fields.gsoType ?? 0);
  view.setUint16(at.hdr_len, fields.hdrLen ?? 0, true);
  view.setUint16(at.gso_size, fields.gsoSize ?? 0, true);
  view.setUint16(at.csum_start, fields.csumStart ?? 0, true);
  view.setUint16(at.csum_offset, fields.csumOffset ?? 0, true);
  view.setUint16(at.num_buffers, fields.numBuffers ?? 0, true);
  return new Uint8Array(view.buffer);
}

export function parseHeader(bytes: Uint8Array): Required<Header> {
  const at = abi.virtio_net_hdr_v1;
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  return {
    flags: view.getUint8(at.flags),
    gsoType: view.getUint8(at.gso_type),
    hdrLen: view.getUint16(at.hdr_len, true),
    gsoSize: view.getUint16(at.gso_size, true),
    csumStart: view.getUint16(at.csum_start, true),
    csumOffset: view.getUint16(at.csum_offset, true),
    numBuffers: view.getUint16(at.num_buffers, true),
  };
}

/** An Ethernet frame of that length, of bytes that tell it from others. */
export function frame(length: number, seed = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 7 + seed * 31 + (i >> 8)) & 0xff);
}

export function join(...parts: readonly Uint8Array[]): Uint8Array {
  return new Uint8Array(Buffer.concat(parts));
}

/** A backend that keeps what it is given and has what it is told to have. */
export class FakeBackend implements NetBackend {
  offloads = 15;
  mtu: number | undefined = undefined;
  up = true;
  onReadable = () => {};
  onWritable = () => {};
  onDown = () => {};
  readonly sent: { header: Required<Header>; frame: Uint8Array }[] = [];
  readonly incoming: Uint8Array[] = [];
  /** What send() says; frames are kept when that is `taken`. */
  result: SendResult = 'taken';
  offloadsSet: number[] = [];
  awaitsReadable = false;
  awaitsWritable = false;
  /** How often receive() was called. */
  reads = 0;

  setOffloads(offloads: number): void {
    this.offloadsSet.push(offloads);
  }

  send(_io: GuestIo, header: Uint8Array, frame: Segments): SendResult {
    if (this.result !== 'taken') return this.result;
    const bytes = new Uint8Array(frame.length);
    frame.read(0, bytes);
    this.sent.push({ header: parseHeader(header), frame: bytes });
    return 'taken';
  }

  awaitWritable(): void {
    this.awaitsWritable = true;
  }

  receive(): Uint8Array | undefined {
    this.reads++;
    return this.incoming.shift();
  }

  awaitReadable(): void {
    this.awaitsReadable = true;
  }

  /** Frames, with their headers, come in. */
  arrive(...frames: readonly Uint8Array[]): void {
    this.incoming.push(...frames.map((frame) => frame.slice()));
    if (this.awaitsReadable) {
      this.awaitsReadable = false;
      this.onReadable();
    }
  }

  /** There is room again. */
  drain(): void {
    this.result = 'taken';
    if (this.awaitsWritable) {
      this.awaitsWritable = false;
      this.onWritable();
    }
  }
}
