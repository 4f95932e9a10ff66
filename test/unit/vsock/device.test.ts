import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { VsockChannel } from '#dist/backends/vsock/channel.js';
import { addon } from '#dist/kvm/addon.js';
import { StateReader } from '#dist/state-reader.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { VirtioVsock } from '#dist/virtio/vsock/vsock.js';
import { MachineRig } from '../../support/virtio/machine-rig.js';
import { MockDriver, type MockQueue } from '../../support/virtio/mock-driver.js';
import {
  GUEST_CID,
  HEADER,
  Messages,
  message,
  notice,
  Op,
  type Packet,
  packet,
  parsePacket,
  pattern,
} from './packets.js';

const MAX_PAYLOAD = 65_536;

/** The main thread's end of a device's socket, by raw reads and writes. */
class Peer {
  readonly fd: number;
  readonly packets: Packet[] = [];
  readonly notices: { generation: number; up: boolean }[] = [];
  readonly #messages = new Messages();

  constructor(fd: number) {
    this.fd = fd;
  }

  /** Takes at most so many bytes. @returns how many there were. */
  read(most = 1 << 20): number {
    const chunk = new Uint8Array(most);
    const count = Math.max(0, addon.read(this.fd, chunk, 0, most));
    for (const bytes of this.#messages.push(chunk.subarray(0, count))) {
      if (bytes.length === 5) {
        this.notices.push({ generation: Buffer.from(bytes).readUInt32LE(), up: bytes[4] === 1 });
      } else {
        this.packets.push(parsePacket(bytes));
      }
    }
    return count;
  }

  /** @returns how many bytes of it the socket took. */
  write(bytes: Uint8Array): number {
    return addon.write(this.fd, bytes, 0, bytes.length);
  }

  /** Says that it knows of the driver of now. */
  agree(): void {
    this.read();
    const { generation, up } = this.notices.at(-1) ?? { generation: 0, up: false };
    this.write(message(notice(generation, up)));
  }
}

let rig: MachineRig;
let peer: Peer;
let fd: number;
let channel: VsockChannel;
let warnings: string[];
let device: VirtioVsock;
let driver: MockDriver;

beforeEach(() => {
  rig = new MachineRig();
  const pair = addon.socketpair() as [number, number];
  fd = pair[1];
  peer = new Peer(pair[0]);
  channel = new VsockChannel(fd, rig.events);
  warnings = [];
  device = makeDevice();
  driver = new MockDriver(device, rig.memory);
});
afterEach(() => {
  expect(driver.broken).toEqual([]);
  channel[Symbol.dispose]();
  addon.close(fd);
  addon.close(peer.fd);
  rig[Symbol.dispose]();
});

function makeDevice(cid = GUEST_CID): VirtioVsock {
  const warn = (message: string) => void warnings.push(message);
  return new VirtioVsock({ cid, channel, io: rig.io, warn });
}

/** The driver is ready, and the main thread knows. */
function start(): { rx: MockQueue; tx: MockQueue; event: MockQueue } {
  driver.initialize();
  peer.agree();
  rig.pump();
  const [rx, tx, event] = driver.queues as [MockQueue, MockQueue, MockQueue];
  return { rx, tx, event };
}

/** What the guest finds in its receive buffers. */
function received(rx: MockQueue): Packet[] {
  return rx.completions().map(({ data, written }) => parsePacket(data.subarray(0, written)));
}

const fromHost = (fields: Partial<Packet>) =>
  message(packet({ srcCid: 2n, dstCid: BigInt(GUEST_CID), srcPort: 2000, dstPort: 1000, ...fields }));

describe('5.10 Socket Device', () => {
  test('5.10.1, 5.10.2: its type, and queues for rx, tx and events', () => {
    expect(driver.read32(abi.VIRTIO_MMIO_DEVICE_ID)).toBe(19);
    expect(device.queueSizes).toHaveLength(3);
  });

  test('5.10.3.2: stream sockets are offered; a driver that accepts no feature has them all the same', () => {
    expect(device.features).toBe(1n);
    driver.initialize({ features: 0n });
    peer.agree();
    driver.queues[1]?.request([packet({ op: Op.REQUEST })]);
    peer.read();
    expect(peer.packets).toHaveLength(1);
  });

  test.each([3, 42, 0xffff_fffe])('5.10.4: guest_cid is 64 bits wide, of which the upper half is 0: %d', (cid) => {
    driver = new MockDriver(makeDevice(cid), rig.memory);
    const config = driver.readConfig(0, 8);
    expect(new DataView(config.buffer).getBigUint64(0, true)).toBe(BigInt(cid));
    driver.writeConfig(0, new Uint8Array(8)); // read-only
    expect(driver.readConfig(0, 8)).toEqual(config);
  });
  // 5.10.6.4.2 "guest_cid MUST NOT contain a reserved CID": config.test.ts. "A RST reply MUST be sent [...] unknown
  // type", and 5.10.6.3 on credit: host.test.ts, since the device passes them on.

  test('5.10.6: packets of the guest come out as they are, in order', () => {
    const { tx } = start();
    const fields = { srcPort: 0xffff_fffe, dstPort: 0x8000_0000, flags: 7, bufAlloc: 0xffff_ffff, fwdCnt: 0x8000_0001 };
    tx.request([packet({ ...fields, op: Op.REQUEST })]);
    tx.request([packet({ ...fields, payload: pattern(5000) })]);
    const split = packet({ payload: pattern(300) });
    tx.request([split.subarray(0, 10), split.subarray(10, 50), split.subarray(50)], { indirect: true });
    tx.request([packet({ payload: pattern(MAX_PAYLOAD) })]);
    peer.read();
    expect(peer.packets[0]).toMatchObject({ ...fields, op: Op.REQUEST, len: 0, srcCid: 3n, dstCid: 2n, type: 1 });
    expect(peer.packets[1]).toMatchObject({ ...fields, op: Op.RW, len: 5000, payload: pattern(5000) });
    expect(peer.packets[2]?.payload).toEqual(pattern(300));
    expect(peer.packets[3]?.payload).toEqual(pattern(MAX_PAYLOAD));
  });

  test('5.10.6: of a buffer longer than len, only the first len bytes are data', () => {
    const { tx } = start();
    tx.request([packet({ payload: pattern(100), len: 60 })]);
    tx.request([packet({ payload: pattern(100), len: 0 })]);
    tx.request([packet({ op: Op.SHUTDOWN, payload: pattern(100) })]); // only RW has data
    peer.read();
    expect(peer.packets.map(({ len, payload }) => [len, payload.length])).toEqual([
      [60, 60],
      [0, 0],
      [0, 0],
    ]);
    expect(peer.packets[0]?.payload).toEqual(pattern(60));
  });

  test('unknown types and operations are passed on: the other side answers them', () => {
    const { tx } = start();
    tx.request([packet({ type: 9, op: Op.REQUEST })]);
    tx.request([packet({ op: 99 })]);
    peer.read();
    expect(peer.packets).toMatchObject([{ type: 9 }, { op: 99 }]);
  });

  test.each([
    ['no header', new Uint8Array(43), /43 bytes, less than a header/],
    ['nothing', 10, /0 bytes, less than a header/],
    ['more length than bytes', packet({ len: 101, payload: pattern(100) }), /of 101 bytes in a buffer of 100/],
    ['the greatest length', packet({ len: 0xffff_ffff }), /of 4294967295 bytes in a buffer of 0/],
    ['the CID of another', packet({ srcCid: 4n }), /address that is not its own/],
    ['the CID of the host', packet({ srcCid: 2n }), /address that is not its own/],
    ['a CID with an upper half', packet({ srcCid: 3n + (1n << 32n) }), /address that is not its own/],
    ['a destination beside the host', packet({ dstCid: 3n }), /not the host/],
    ['a destination with an upper half', packet({ dstCid: 2n + (1n << 63n) }), /not the host/],
  ] as const)('a packet with %s is completed and dropped, with a warning', (_, bytes, warning) => {
    const { tx } = start();
    tx.request([bytes]);
    expect(warnings).toEqual([expect.stringMatching(warning)]);
    tx.request([packet({ payload: pattern(10) })]);
    peer.read();
    expect(peer.packets).toMatchObject([{ len: 10 }]);
  });

  test('a packet that is too long resets its connection: it comes out as one of no operation', () => {
    const { tx } = start();
    tx.request([packet({ srcPort: 77, payload: pattern(MAX_PAYLOAD + 1) })]);
    peer.read();
    expect(peer.packets).toMatchObject([{ srcPort: 77, op: Op.INVALID, len: 0 }]);
    expect(warnings).toHaveLength(1);
  });

  test('packets for the guest', () => {
    const { rx } = start();
    for (const size of [HEADER, 4096, HEADER + 10]) rx.add([HEADER, size - HEADER].filter((n) => n > 0));
    rx.notify();
    peer.write(fromHost({ op: Op.RESPONSE, bufAlloc: 7 }));
    peer.write(fromHost({ payload: pattern(4096 - HEADER) }));
    peer.write(fromHost({ payload: pattern(10) }));
    rig.pump();
    const [response, full, small] = received(rx);
    expect(response).toMatchObject({ srcCid: 2n, dstCid: 3n, op: Op.RESPONSE, len: 0, bufAlloc: 7 });
    expect(full).toMatchObject({ op: Op.RW, len: 4096 - HEADER, payload: pattern(4096 - HEADER) });
    expect(small?.payload).toEqual(pattern(10));
    expect(driver.interrupts).toBeGreaterThan(0);
  });

  test.each([1, 100, 4096, 30_000])('a packet is split over buffers of %d bytes of data', async (size) => {
    const { rx } = start();
    const length = Math.min(MAX_PAYLOAD, 50 * size);
    const got: Packet[] = [];
    peer.write(fromHost({ payload: pattern(length), fwdCnt: 5 }));
    peer.write(fromHost({ op: Op.SHUTDOWN }));
    await rig.until(() => {
      if (rx.usedIndex % 3 === 0) for (let i = 0; i < 3; i++) rx.add([HEADER + size]); // now and then
      rx.notify();
      got.push(...received(rx));
      return got.at(-1)?.op === Op.SHUTDOWN;
    });
    got.pop();
    expect(got).toHaveLength(Math.ceil(length / size));
    for (const part of got) {
      expect(part).toMatchObject({ op: Op.RW, fwdCnt: 5, len: part.payload.length, srcPort: 2000, dstPort: 1000 });
    }
    expect(Buffer.concat(got.map(({ payload }) => payload)).equals(pattern(length))).toBe(true);
  });

  test('receive buffers without room for data are given back', () => {
    const { rx } = start();
    for (const buffer of [HEADER - 1, HEADER, pattern(10), HEADER + 5]) rx.add([buffer]);
    rx.notify();
    peer.write(fromHost({ payload: pattern(5) }));
    rig.pump();
    expect(rx.completions().map(({ written }) => written)).toEqual([0, 0, 0, HEADER + 5]);
    expect(warnings).toHaveLength(3);
  });

  test('5.10.6.1.2: the tx queue MUST be processed even when the rx queue is full', () => {
    const { rx, tx } = start();
    while (peer.write(fromHost({ payload: pattern(4000) })) === 4048); // nobody takes them
    rig.pump();
    for (let i = 0; i < 50; i++) {
      tx.request([packet({ srcPort: i, op: Op.RST })]);
      peer.read();
    }
    expect(peer.packets).toHaveLength(50);
    rx.send([HEADER + 4000]);
    expect(received(rx)).toHaveLength(1);
  });

  test('a full channel: packets wait in the tx queue, none is lost, the rx queue goes on', async () => {
    const { rx, tx } = start();
    const COUNT = 100;
    for (let i = 0; i < COUNT; i++) tx.add([packet({ srcPort: i, payload: pattern(20_000, i) })]);
    tx.notify();
    for (let i = 0; i < 10; i++) rig.pump();
    expect(tx.usedIndex).toBeLessThan(COUNT);
    rx.send([4096]);
    peer.write(fromHost({ op: Op.RESPONSE }));
    rig.pump();
    expect(received(rx)).toHaveLength(1);
    await rig.until(() => {
      peer.read(7919);
      return peer.packets.length === COUNT;
    });
    expect(tx.usedIndex).toBe(COUNT);
    peer.packets.forEach(({ srcPort, payload }, i) => {
      expect(srcPort).toBe(i);
      expect(Buffer.from(payload).equals(pattern(20_000, i))).toBe(true);
    });
  });
});

describe('drivers that come and go', () => {
  test('the main thread is told, and what it sent before is not for the next driver', async () => {
    const { rx } = start();
    expect(peer.notices.map(({ up }) => up)).toEqual([false, true]);
    rx.send([4096]);
    peer.write(fromHost({ op: Op.RST, srcPort: 1 }));
    driver.initialize(); // before that was read
    const [again] = driver.queues as [MockQueue];
    again.send([4096]);
    peer.write(fromHost({ op: Op.RST, srcPort: 2 }));
    rig.pump();
    peer.agree();
    expect(peer.notices.at(-1)?.up).toBe(true);
    expect(new Set(peer.notices.map(({ generation }) => generation)).size).toBe(peer.notices.length);
    peer.write(fromHost({ op: Op.RST, srcPort: 3 }));
    rig.pump();
    expect(received(again)).toMatchObject([{ srcPort: 3 }]);
  });

  test('an answer to an older notice is none', () => {
    start();
    const { generation, up } = peer.notices.at(-1) as { generation: number; up: boolean };
    driver.initialize();
    const [rx] = driver.queues as [MockQueue];
    rx.send([4096]);
    peer.write(message(notice(generation, up)));
    peer.write(fromHost({ op: Op.RST, srcPort: 1 }));
    rig.pump();
    expect(received(rx)).toEqual([]);
    peer.agree();
    peer.write(fromHost({ op: Op.RST, srcPort: 2 }));
    rig.pump();
    expect(received(rx)).toMatchObject([{ srcPort: 2 }]);
  });

  test('half a packet is delivered, then the driver resets: the other half is not', () => {
    const { rx } = start();
    rx.send([HEADER + 100]);
    peer.write(fromHost({ payload: pattern(200) }));
    rig.pump();
    expect(received(rx)).toHaveLength(1);
    const next = start().rx;
    next.send([4096]);
    peer.write(fromHost({ payload: pattern(7) }));
    rig.pump();
    expect(received(next)).toMatchObject([{ len: 7, payload: pattern(7) }]);
  });

  test('many resets while the channel is full: the packet that was begun is ended, then the last state is told', async () => {
    const { tx } = start();
    for (let i = 0; i < 60; i++) tx.add([packet({ payload: pattern(20_000) })]);
    tx.notify();
    const begun = tx.usedIndex;
    expect(begun).toBeLessThan(60);
    peer.notices.length = 0;
    for (let i = 0; i < 1000; i++) driver.initialize();
    await rig.until(() => peer.read() > 0 && peer.notices.length > 0);
    rig.pump();
    peer.read();
    expect(peer.packets).toHaveLength(begun);
    expect(peer.notices.at(-1)?.up).toBe(true);
    expect(peer.notices.length).toBeLessThan(3);
  });

  test('a new machine on the same channel: nothing is left of the driver of before', () => {
    start();
    device = makeDevice();
    peer.read();
    expect(peer.notices.at(-1)?.up).toBe(false);
    driver = new MockDriver(device, rig.memory);
    start();
    expect(peer.notices.at(-1)?.up).toBe(true);
  });

  test('the main thread is gone: packets are completed, and go nowhere', () => {
    const { tx } = start();
    const other = addon.socketpair() as [number, number];
    addon.close(peer.fd);
    for (let i = 0; i < 10; i++) tx.request([packet({ op: Op.REQUEST })]);
    expect(channel.up).toBe(false);
    driver.initialize();
    peer = new Peer(other[0]); // for afterEach
    addon.close(other[1]);
  });
});

describe('5.10.6.7 Device Events', () => {
  const restore = (saved: object = { heardAt: null }) => device.restore(new StateReader(saved, 'device'));
  const wait = (op: number) => {
    peer.write(fromHost({ op }));
    rig.pump();
  };

  test('a restored device tells the guest that its connections are no more, once there is a buffer', () => {
    const { rx, event } = start();
    rx.send([4096]);
    restore();
    wait(Op.REQUEST);
    expect(received(rx)).toEqual([]);
    event.send([8]);
    expect(event.completions()).toMatchObject([{ written: 4, data: new Uint8Array(8) }]);
    expect(received(rx)).toEqual([]); // it may not have read that yet
    event.send([4]);
    expect(event.completions()).toEqual([]);
    expect(received(rx)).toMatchObject([{ op: Op.REQUEST }]);
    expect(device.save()).toEqual({ heardAt: null });
  });

  test('packets for the guest wait until it has read the event, those of the guest do not', () => {
    const { rx, tx, event } = start();
    for (let i = 0; i < 8; i++) event.add([4]);
    event.notify();
    rx.send([4096]);
    restore();
    wait(Op.REQUEST);
    event.notify(); // without a reason
    rx.send([4096]);
    tx.send([packet({ op: Op.RST })]);
    peer.read();
    expect(peer.packets).toMatchObject([{ op: Op.RST }]);
    expect(received(rx)).toEqual([]);
    expect(event.completions()).toHaveLength(1);
    event.send([4]);
    expect(received(rx)).toMatchObject([{ op: Op.REQUEST }]);
  });

  test('without event-idx just as well', () => {
    driver.initialize({ features: 0n });
    peer.agree();
    rig.pump();
    const [rx, , event] = driver.queues as [MockQueue, MockQueue, MockQueue];
    for (let i = 0; i < 8; i++) event.send([4]);
    rx.send([4096]);
    restore();
    wait(Op.REQUEST);
    expect(received(rx)).toEqual([]);
    event.send([4]);
    expect(received(rx)).toMatchObject([{ op: Op.REQUEST }]);
  });

  test('saved before the guest has read an event, it tells of another and waits for both', () => {
    const { rx, event } = start();
    for (let i = 0; i < 8; i++) event.send([4]);
    rx.send([4096]);
    restore();
    restore(device.save());
    wait(Op.REQUEST);
    expect(event.completions()).toHaveLength(2);
    event.send([4]);
    expect(received(rx)).toEqual([]);
    event.send([4]);
    expect(received(rx)).toMatchObject([{ op: Op.REQUEST }]);
  });

  test('a driver that starts anew has nothing to hear', () => {
    start().event.send([4]);
    restore();
    const { rx, event } = start();
    event.send([4]);
    expect(event.completions()).toEqual([]);
    rx.send([4096]);
    wait(Op.REQUEST);
    expect(received(rx)).toMatchObject([{ op: Op.REQUEST }]);
  });

  test('without a driver there is nobody to tell; a wrong state is refused', () => {
    restore();
    const { event } = start();
    event.send([4]);
    expect(event.completions()).toEqual([]);
    for (const heardAt of [undefined, -1, 65_536, 0.5, '1', {}]) {
      expect(() => restore({ heardAt })).toThrow('heardAt');
    }
  });
});
