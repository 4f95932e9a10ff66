import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { Offload } from '#dist/virtio/net/backend.js';
import { expectDamageIsRefused } from '../../support/damaged-state.js';
import { MockDriver } from '../../support/virtio/mock-driver.js';
import { FakeBackend, frame, type Header, header, join, MAC, NetRig, parseHeader, RX, TX } from './rig.js';

const { VIRTIO_NET_HDR_F_NEEDS_CSUM: NEEDS_CSUM, VIRTIO_NET_HDR_F_DATA_VALID: DATA_VALID } = abi;
const { VIRTIO_NET_HDR_GSO_TCPV4: TCPV4, VIRTIO_NET_HDR_GSO_TCPV6: TCPV6, VIRTIO_NET_HDR_GSO_ECN: ECN } = abi;
const { VIRTIO_NET_HDR_GSO_UDP: UDP } = abi;
const BASIC =
  feature(abi.VIRTIO_NET_F_MAC) |
  feature(abi.VIRTIO_NET_F_STATUS) |
  feature(abi.VIRTIO_F_VERSION_1) |
  feature(abi.VIRTIO_RING_F_INDIRECT_DESC);
const MERGEABLE = BASIC | feature(abi.VIRTIO_NET_F_MRG_RXBUF);
const SEGMENT: Header = { flags: NEEDS_CSUM, gsoType: TCPV4, hdrLen: 54, gsoSize: 1448, csumStart: 34, csumOffset: 16 };

let rig: NetRig;
let backend: FakeBackend;
beforeEach(() => {
  rig = new NetRig();
  backend = new FakeBackend();
});
afterEach(() => rig[Symbol.dispose]());

/** A ready driver whose device has begun to read. */
function ready(features?: bigint) {
  const made = rig.driver(backend, features === undefined ? {} : { features });
  const [rx, tx] = made.driver.queues as [(typeof made.driver.queues)[0], (typeof made.driver.queues)[0]];
  // The first look at the backend comes through the run loop.
  const started = rig.until(() => backend.awaitsReadable);
  return { ...made, rx, tx, started };
}

describe('features and configuration', () => {
  const { VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM } = abi;
  test.each([
    ['GUEST_TSO4', abi.VIRTIO_NET_F_GUEST_TSO4, [VIRTIO_NET_F_GUEST_CSUM]],
    ['GUEST_TSO6', abi.VIRTIO_NET_F_GUEST_TSO6, [VIRTIO_NET_F_GUEST_CSUM]],
    ['GUEST_ECN', abi.VIRTIO_NET_F_GUEST_ECN, [abi.VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_CSUM]],
    ['GUEST_ECN', abi.VIRTIO_NET_F_GUEST_ECN, [abi.VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_CSUM]],
    ['HOST_TSO4', abi.VIRTIO_NET_F_HOST_TSO4, [VIRTIO_NET_F_CSUM]],
    ['HOST_TSO6', abi.VIRTIO_NET_F_HOST_TSO6, [VIRTIO_NET_F_CSUM]],
    ['HOST_ECN', abi.VIRTIO_NET_F_HOST_ECN, [abi.VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_CSUM]],
    ['HOST_ECN', abi.VIRTIO_NET_F_HOST_ECN, [abi.VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_CSUM]],
  ])('5.1.3.1: %s needs what it requires', (_, bit, others) => {
    const net = rig.device(backend);
    const all = others.reduce((set, other) => set | feature(other), feature(bit));
    expect(net.acceptsFeatures(all)).toBe(true);
    expect(net.acceptsFeatures(feature(bit))).toBe(false);
    const driver = new MockDriver(net, rig.memory);
    driver.status = abi.VIRTIO_CONFIG_S_ACKNOWLEDGE | abi.VIRTIO_CONFIG_S_DRIVER;
    driver.writeFeatures(BASIC | feature(bit));
    driver.status |= abi.VIRTIO_CONFIG_S_FEATURES_OK;
    expect(driver.status & abi.VIRTIO_CONFIG_S_FEATURES_OK).toBe(0);
  });

  test('5.1.3: only what the backend can do is offered', () => {
    backend.offloads = 3;
    const offered = rig.device(backend).features;
    for (const bit of [abi.VIRTIO_NET_F_HOST_TSO4, abi.VIRTIO_NET_F_GUEST_TSO4, abi.VIRTIO_NET_F_CSUM]) {
      expect(offered & feature(bit)).not.toBe(0n);
    }
    for (const bit of [abi.VIRTIO_NET_F_HOST_TSO6, abi.VIRTIO_NET_F_GUEST_ECN, abi.VIRTIO_NET_F_MTU]) {
      expect(offered & feature(bit)).toBe(0n);
    }
  });

  test('5.1.4: MAC, link status, and the MTU of a backend that has one', () => {
    backend.mtu = 9000;
    const { net, driver } = ready();
    expect(net.features & feature(abi.VIRTIO_NET_F_MTU)).not.toBe(0n);
    expect(driver.readConfig(0, 6)).toEqual(MAC);
    expect(driver.readConfig(abi.virtio_net_config.status, 2)).toEqual(Uint8Array.of(1, 0));
    expect(driver.readConfig(abi.virtio_net_config.mtu, 2)).toEqual(Uint8Array.of(0x28, 0x23));
    driver.writeConfig(0, Uint8Array.of(1, 2, 3, 4, 5, 6));
    expect(driver.readConfig(0, 6)).toEqual(MAC);
    expect(driver.readConfig(200, 4)).toEqual(Uint8Array.of(255, 255, 255, 255));
  });

  test('5.1.4.1: no received packet exceeds a negotiated MTU, unless it is to be cut', async () => {
    backend.mtu = 1280;
    const { net, rx, started } = ready();
    await started;
    rx.add([4096]);
    rx.send([4096]);
    backend.arrive(join(header(), frame(14 + 4 + 1281)), join(header(), frame(14 + 4 + 1280)));
    backend.arrive(join(header(SEGMENT), frame(3000)));
    expect(rx.completions().map(({ written }) => written)).toEqual([12 + 14 + 4 + 1280, 12 + 3000]);
    expect(net.counters).toMatchObject({ receivedFrames: 2, receivedTooLong: 1 });
  });

  test('5.1.4.2: a link that goes down is told, and takes what is sent to nowhere', () => {
    const { net, driver, tx } = ready();
    backend.result = 'full';
    tx.send([header(), frame(60)]);
    expect(tx.completions()).toHaveLength(0);
    backend.up = false;
    backend.result = 'refused';
    backend.onDown();
    expect(driver.acknowledge() & abi.VIRTIO_MMIO_INT_CONFIG).not.toBe(0);
    expect(driver.readConfig(abi.virtio_net_config.status, 2)).toEqual(Uint8Array.of(0, 0));
    expect(tx.completions()).toHaveLength(1);
    expect(net.counters.sentRefused).toBe(1);
    const next = new MockDriver(rig.device(backend), rig.memory); // after the guest's reset
    expect(next.readConfig(abi.virtio_net_config.status, 2)).toEqual(Uint8Array.of(0, 0));
  });

  test('the backend is told what the driver accepts, and nothing after a reset', () => {
    const { driver } = ready(BASIC | feature(VIRTIO_NET_F_GUEST_CSUM) | feature(abi.VIRTIO_NET_F_GUEST_TSO6));
    expect(backend.offloadsSet.at(-1)).toBe(1 | 4);
    driver.status = 0;
    expect(backend.offloadsSet.at(-1)).toBe(0);
    driver.initialize({ features: BASIC });
    expect(backend.offloadsSet.at(-1)).toBe(0);
    driver.initialize();
    expect(backend.offloadsSet.at(-1)).toBe(15);
  });
});

describe('transmission', () => {
  test.each([
    ['in one buffer', (bytes: Uint8Array) => [bytes]],
    ['in two', (bytes: Uint8Array) => [bytes.subarray(0, 12), bytes.subarray(12)]],
    ['cut in the header', (bytes: Uint8Array) => [bytes.subarray(0, 5), bytes.subarray(5, 40), bytes.subarray(40)]],
    ['a byte each', (bytes: Uint8Array) => Array.from(bytes.subarray(0, 90), (_, i) => bytes.subarray(i, i + 1))],
  ])('5.1.6.2: a frame %s goes out as it is, and its buffers come back', (_, cut) => {
    const { net, tx } = ready();
    const bytes = join(header(), frame(78));
    for (const indirect of [false, true]) {
      expect(tx.request(cut(bytes), { indirect }).written).toBe(0);
      expect(backend.sent.pop()).toEqual({ header: parseHeader(header()), frame: frame(78) });
    }
    expect(net.counters).toMatchObject({ sentFrames: 2, sentBytes: 156 });
  });

  test('5.1.6.2: checksum and segmentation go to the backend as they were asked for', () => {
    const { tx } = ready();
    for (const gsoType of [TCPV4, TCPV6, TCPV4 | ECN]) {
      const fields = { ...SEGMENT, gsoType };
      tx.request([header(fields), frame(5000)]);
      expect(backend.sent.pop()?.header).toEqual({ ...fields, numBuffers: 0 });
    }
    const checksum = { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 6 };
    tx.request([header(checksum), frame(100)]);
    expect(backend.sent.pop()?.header).toMatchObject(checksum);
  });

  test('5.1.6.2.2: unknown flags are ignored, csum_start and csum_offset without NEEDS_CSUM too', () => {
    const { tx } = ready();
    tx.request([header({ flags: 0xfe, csumStart: 0xffff, csumOffset: 0xffff, gsoSize: 9, numBuffers: 7 }), frame(60)]);
    expect(backend.sent.pop()?.header).toEqual(parseHeader(header()));
    tx.request([header({ flags: 0xff, csumStart: 34, csumOffset: 6 }), frame(60)]);
    expect(backend.sent.pop()?.header).toEqual(
      parseHeader(header({ flags: NEEDS_CSUM, csumStart: 34, csumOffset: 6 })),
    );
  });

  test('5.1.6.2.2: hdr_len is not relied on', () => {
    const { tx } = ready();
    tx.request([header({ ...SEGMENT, hdrLen: 0xffff }), frame(2000)]);
    expect(backend.sent.pop()?.header).toMatchObject({ hdrLen: 2000 });
    tx.request([header({ ...SEGMENT, hdrLen: 0 }), frame(2000)]);
    expect(backend.sent.pop()?.header).toMatchObject({ hdrLen: 0 });
  });

  const csum = feature(abi.VIRTIO_NET_F_CSUM);
  const tso4 = csum | feature(abi.VIRTIO_NET_F_HOST_TSO4);
  const ALL = ~0n;
  test.each<[string, bigint, Header, boolean]>([
    ['a checksum that was not negotiated', 0n, { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 6 }, false],
    ['a checksum', csum, { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 6 }, true],
    ['a checksum field that ends with the frame', csum, { flags: NEEDS_CSUM, csumStart: 90, csumOffset: 8 }, true],
    ['a checksum field past the end', csum, { flags: NEEDS_CSUM, csumStart: 90, csumOffset: 9 }, false],
    ['a checksum far outside', csum, { flags: NEEDS_CSUM, csumStart: 0xffff, csumOffset: 0xffff }, false],
    ['segments that were not negotiated', csum, { ...SEGMENT, gsoSize: 10 }, false],
    ['segments', tso4, { ...SEGMENT, gsoSize: 10 }, true],
    ['IPv6 segments, where IPv4 was negotiated', tso4, { ...SEGMENT, gsoType: TCPV6 }, false],
    ['ECN, which was not', tso4, { ...SEGMENT, gsoType: TCPV4 | ECN }, false],
    ['segments without a checksum', ALL, { ...SEGMENT, flags: 0 }, false],
    ['segments of no size', ALL, { ...SEGMENT, gsoSize: 0 }, false],
    ['UDP fragments, which are never offered', ALL, { ...SEGMENT, gsoType: UDP }, false],
    ['UDP segments', ALL, { ...SEGMENT, gsoType: 5 }, false],
    ['an unknown kind of segments', ALL, { ...SEGMENT, gsoType: 0x41 }, false],
    ['ECN alone', ALL, { ...SEGMENT, gsoType: ECN }, false],
  ])('5.1.6.2.1: %s', (_, features, fields, taken) => {
    const { net, tx } = ready(features === ALL ? ALL : BASIC | features);
    expect(tx.request([header(fields), frame(100)]).written).toBe(0);
    expect(backend.sent).toHaveLength(taken ? 1 : 0);
    expect(net.counters.sentBadHeader).toBe(taken ? 0 : 1);
  });

  test('frames that cannot be are dropped, counted and completed', () => {
    const { net, driver, tx } = ready();
    const buffers: (Uint8Array | number)[][] = [
      [new Uint8Array(0)],
      [new Uint8Array(11)],
      [header()],
      [header(), frame(13)],
      [header(), frame(65_551)],
      [100], // nothing to read
      [header(), frame(13), 1000],
    ];
    for (const buffer of buffers) tx.request(buffer);
    expect(backend.sent).toHaveLength(0);
    expect(net.counters).toMatchObject({ sentTooShort: 6, sentTooLong: 1 });
    tx.request([header(), frame(14)]);
    tx.request([header(), frame(65_550)]);
    expect(backend.sent).toHaveLength(2);
    backend.result = 'refused';
    tx.request([header(), frame(60)]);
    expect(net.counters).toMatchObject({ sentFrames: 2, sentRefused: 1 });
    expect(driver.broken).toEqual([]);
  });

  test('the header is read once: what the guest makes of it later changes nothing', () => {
    const { driver, tx } = ready();
    const gpa = driver.allocate(100);
    driver.memory.write(gpa, join(header(), frame(60)));
    tx.writeDescriptor(tx.descriptors, 0, gpa, 72, 0, 0);
    backend.send = (_io, passed) => {
      driver.memory.write(gpa, header(SEGMENT));
      backend.sent.push({ header: parseHeader(passed), frame: frame(0) });
      return 'taken';
    };
    tx.makeAvailable(0);
    tx.notify();
    expect(backend.sent[0]?.header).toEqual(parseHeader(header()));
  });

  test('a full backend stops it, in order; nothing is lost and nothing is tried meanwhile', () => {
    const { net, tx } = ready();
    tx.request([header(), frame(60, 0)]);
    backend.result = 'full';
    for (let i = 1; i <= 5; i++) tx.send([header(), frame(60, i)]);
    expect(tx.completions()).toHaveLength(0);
    expect(backend.awaitsWritable).toBe(true);
    backend.result = 'taken';
    tx.send([header(), frame(60, 6)]);
    expect(backend.sent).toHaveLength(1); // it waits to be told
    backend.drain();
    expect(tx.completions()).toHaveLength(6);
    expect(backend.sent.map((sent) => sent.frame)).toEqual([0, 1, 2, 3, 4, 5, 6].map((i) => frame(60, i)));
    expect(net.counters.sentFrames).toBe(7);
  });

  test('a whole queue of frames in a row, and one interrupt for them', async () => {
    const { driver, tx, started } = ready(BASIC);
    await started;
    for (let i = 0; i < 256; i++) tx.add([join(header(), frame(60, i))]);
    tx.notify();
    expect(tx.completions()).toHaveLength(256);
    expect(driver.interrupts).toBe(1);
    expect(backend.sent.at(-1)?.frame).toEqual(frame(60, 255));
  });
});

describe('reception', () => {
  test('5.1.6.3.2: one buffer a frame without MRG_RXBUF, num_buffers 1', async () => {
    const { net, rx, started } = ready(BASIC);
    await started;
    for (let i = 0; i < 3; i++) rx.send([100, 1000, 426]);
    backend.arrive(join(header({ numBuffers: 77 }), frame(60)), join(header(), frame(1514)));
    const [first, second, ...more] = rx.completions();
    expect(more).toEqual([]);
    expect(first?.written).toBe(72);
    expect(first?.data.subarray(0, 72)).toEqual(join(header({ numBuffers: 1 }), frame(60)));
    expect(second?.data).toEqual(join(header({ numBuffers: 1 }), frame(1514)));
    backend.arrive(join(header(), frame(1515)), join(header(), frame(61)));
    expect(rx.completions().map(({ written }) => written)).toEqual([73]);
    expect(net.counters).toMatchObject({ receivedFrames: 3, receivedBytes: 60 + 1514 + 61, receivedTooLong: 1 });
  });

  test.each([
    [100, 72, 1],
    [72, 72, 1],
    [71, 72, 2],
    [1500, 65_562, 44],
    [12, 3072, 256],
  ])('5.1.6.4.1: in buffers of %d bytes, %d bytes take %d', async (size, total, count) => {
    const { driver, rx, started } = ready(MERGEABLE);
    await started;
    const heads = Array.from({ length: 256 }, () => rx.add([size]));
    rx.notify();
    backend.arrive(join(header(), frame(total - 12)));
    const done = rx.completions();
    expect(done.map(({ head }) => head)).toEqual(heads.slice(0, count));
    expect(driver.interrupts).toBe(1);
    for (const { written } of done.slice(0, -1)) expect(written).toBe(size);
    const all = join(...done.map(({ data, written }) => data.subarray(0, written)));
    expect(all).toEqual(join(header({ numBuffers: count }), frame(total - 12)));
  });

  test('a frame longer than any can be is dropped', async () => {
    const { net, rx, started } = ready();
    await started;
    for (let i = 0; i < 50; i++) rx.add([1526]);
    rx.notify();
    backend.arrive(join(header(SEGMENT), frame(65_551)));
    expect(rx.completions()).toEqual([]);
    expect(net.counters.receivedTooLong).toBe(1);
  });

  test('a frame that a whole ring cannot hold is dropped, and the ring is as it was', async () => {
    const { net, rx, started } = ready(MERGEABLE);
    await started;
    for (let i = 0; i < 256; i++) rx.add([256]);
    rx.notify();
    backend.arrive(join(header(), frame(65_550)));
    expect(rx.completions()).toEqual([]);
    expect(net.counters.receivedTooLong).toBe(1);
    backend.arrive(join(header(), frame(60)));
    expect(rx.completions().map(({ head }) => head)).toEqual([0]);
  });

  test('5.1.6.4.1: no flags without GUEST_CSUM, known ones with it', async () => {
    const { rx, started, driver } = ready(BASIC);
    await started;
    rx.send([100]);
    backend.arrive(join(header({ flags: DATA_VALID | 0xf0 }), frame(60)));
    expect(parseHeader(rx.completions()[0]?.data as Uint8Array).flags).toBe(0);
    driver.initialize();
    await rig.until(() => backend.awaitsReadable);
    const again = driver.queues[RX];
    for (const flags of [DATA_VALID, NEEDS_CSUM]) {
      again?.send([100]);
      backend.arrive(join(header({ flags: flags | 0xf0 }), frame(60)));
      expect(parseHeader(again?.completions()[0]?.data as Uint8Array).flags).toBe(flags);
    }
  });

  const GUEST_CSUM = feature(abi.VIRTIO_NET_F_GUEST_CSUM);
  const GUEST_TSO4 = GUEST_CSUM | feature(abi.VIRTIO_NET_F_GUEST_TSO4);
  test.each<[string, bigint, Header, boolean]>([
    ['a partial checksum without GUEST_CSUM', 0n, { flags: NEEDS_CSUM }, false],
    ['TCPV4 without GUEST_TSO4', GUEST_CSUM, SEGMENT, false],
    ['TCPV4 with it', GUEST_TSO4, SEGMENT, true],
    ['TCPV6 without GUEST_TSO6', GUEST_TSO4, { ...SEGMENT, gsoType: TCPV6 }, false],
    ['ECN without GUEST_ECN', GUEST_TSO4, { ...SEGMENT, gsoType: TCPV4 | ECN }, false],
    ['ECN with it', ~0n, { ...SEGMENT, gsoType: TCPV4 | ECN }, true],
    ['UDP', ~0n, { ...SEGMENT, gsoType: UDP }, false],
  ])('5.1.6.4.1: %s', async (_, features, fields, delivered) => {
    const { net, rx, started } = ready(features === ~0n ? features : MERGEABLE | features);
    await started;
    rx.send([4096]);
    backend.arrive(join(header(fields), frame(3000)));
    const done = rx.completions();
    expect(done).toHaveLength(delivered ? 1 : 0);
    expect(net.counters.receivedBadHeader).toBe(delivered ? 0 : 1);
    if (delivered) expect(parseHeader(done[0]?.data as Uint8Array)).toEqual({ ...fields, numBuffers: 1 });
  });

  test.each([
    ['without', BASIC],
    ['with', MERGEABLE],
  ])('nothing is read while the guest has no room, %s MRG_RXBUF', async (_, features) => {
    const { net, rx, started } = ready(features);
    await started;
    const before = backend.reads;
    const frames = Array.from({ length: 10 }, (_, i) => join(header(), frame(1000, i)));
    backend.arrive(...frames);
    expect(backend.reads - before).toBe(1);
    expect(backend.incoming).toHaveLength(9);
    backend.onReadable();
    rx.notify();
    expect(backend.reads - before).toBe(1);
    const received: Uint8Array[] = [];
    for (let i = 0; i < 12; i++) {
      if (features === MERGEABLE) {
        rx.send([1000]); // not enough for the frame and its header
        expect(rx.completions()).toEqual([]);
      }
      rx.send([1012]);
      received.push(join(...rx.completions().map(({ data, written }) => data.subarray(0, written))));
    }
    const numBuffers = features === MERGEABLE ? 2 : 1;
    expect(received.slice(0, 10)).toEqual(frames.map((_, i) => join(header({ numBuffers }), frame(1000, i))));
    expect(net.counters).toMatchObject({ receivedFrames: 10, receivedTooLong: 0, receivedBadHeader: 0 });
  });

  test('a whole queue of frames in a row, and one interrupt for them', async () => {
    const { driver, rx, started } = ready(BASIC);
    await started;
    for (let i = 0; i < 256; i++) rx.add([200]);
    rx.notify();
    backend.arrive(...Array.from({ length: 300 }, (_, i) => join(header(), frame(60, i))));
    expect(rx.completions()).toHaveLength(256);
    expect(driver.interrupts).toBe(1);
  });

  test('256 frames that are dropped in a row, then the others have their turn', async () => {
    const { net, started } = ready(BASIC);
    await started;
    const before = backend.reads;
    backend.arrive(...Array.from({ length: 300 }, () => join(header({ gsoType: 1, gsoSize: 1000 }), frame(3000))));
    expect(backend.reads - before).toBe(256);
    await rig.until(() => net.counters.receivedBadHeader === 300);
    await rig.until(() => backend.awaitsReadable);
  });

  test('EVENT_IDX: the guest is asked to notify of the next buffer when one is missing', async () => {
    const { rx, started } = ready();
    await started;
    rx.send([100]);
    backend.arrive(join(header(), frame(60)), join(header(), frame(61)));
    expect(rx.completions()).toHaveLength(1);
    expect(rx.availEvent).toBe(1);
    rx.add([30]);
    rx.notify();
    expect(rx.completions()).toHaveLength(0);
    expect(rx.availEvent).toBe(2);
    rx.send([100]);
    expect(rx.completions().map(({ written }) => written)).toEqual([30, 43]);
  });
});

describe('resets and hostile drivers', () => {
  test('a reset in the middle: the frame that waited is dropped, its buffers are never written', async () => {
    const { driver, rx, tx, started } = ready(MERGEABLE);
    await started;
    const gpa = driver.allocate(64);
    rx.writeDescriptor(rx.descriptors, 0, gpa, 64, abi.VRING_DESC_F_WRITE, 0);
    rx.makeAvailable(0);
    backend.arrive(join(header(), frame(1000, 1)), join(header(), frame(60, 2)));
    backend.result = 'full';
    tx.send([header(), frame(60)]);
    driver.status = 0;
    backend.drain();
    backend.onReadable();
    rig.pump();
    expect(backend.sent).toEqual([]);
    expect(driver.memory.slice(gpa, 64).every((byte) => byte === 0)).toBe(true);
    driver.initialize({ features: MERGEABLE });
    driver.queues[RX]?.send([2000]);
    await rig.until(() => driver.queues[RX]?.usedIndex === 1);
    expect(driver.queues[RX]?.completions()[0]?.data.subarray(12, 72)).toEqual(frame(60, 2));
    driver.queues[TX]?.request([header(), frame(60, 3)]);
    expect(backend.sent.map((sent) => sent.frame)).toEqual([frame(60, 3)]);
  });

  test('a segment from before a reset is not given to a driver that cannot take it', async () => {
    const { net, driver, started } = ready();
    await started;
    driver.initialize({ features: MERGEABLE });
    await rig.until(() => backend.awaitsReadable);
    driver.queues[RX]?.send([8000]);
    backend.arrive(join(header(SEGMENT), frame(4000)), join(header(), frame(60)));
    expect(driver.queues[RX]?.completions().map(({ written }) => written)).toEqual([72]);
    expect(net.counters.receivedBadHeader).toBe(1);
  });

  test('receive buffers without room, or not writable', async () => {
    const { net, driver, rx, started } = ready(BASIC);
    await started;
    rx.add([new Uint8Array(100)]);
    rx.add([0]);
    rx.send([11]);
    backend.arrive(join(header(), frame(60)), join(header(), frame(60)));
    expect(rx.completions()).toEqual([]);
    expect(net.counters.receivedTooLong).toBe(2);
    expect(driver.broken).toEqual([]);
  });

  test('a ring full of useless receive buffers, merged', async () => {
    const { net, driver, rx, started } = ready(MERGEABLE);
    await started;
    for (let i = 0; i < 256; i++) rx.add([i === 255 ? 71 : 0]);
    rx.notify();
    backend.arrive(join(header(), frame(60)));
    expect(rx.completions()).toEqual([]);
    expect(net.counters.receivedTooLong).toBe(1);
    backend.arrive(join(header(), frame(59)));
    expect(rx.completions()).toHaveLength(256);
    expect(driver.broken).toEqual([]);
  });

  test('a ring that breaks while a frame is spread over it', async () => {
    const { driver, rx, started } = ready(MERGEABLE);
    await started;
    rx.add([40]);
    rx.makeAvailable(0xfff0);
    rx.notify();
    backend.arrive(join(header(), frame(60)), join(header(), frame(60)));
    expect(driver.broken).toHaveLength(1);
    expect(driver.status & abi.VIRTIO_CONFIG_S_NEEDS_RESET).not.toBe(0);
    backend.onReadable();
    rig.pump();
    expect(backend.incoming).toHaveLength(1);
    driver.initialize({ features: MERGEABLE });
    driver.queues[RX]?.send([200]);
    await rig.until(() => driver.queues[RX]?.usedIndex === 1);
  });
});

describe('saved and restored', () => {
  const negotiated = MERGEABLE | feature(abi.VIRTIO_NET_F_GUEST_CSUM);

  test('it goes on over the backend that it is given: offloads are agreed on again, what waits is sent', () => {
    const { driver } = rig.driver(backend, { features: negotiated });
    backend.result = 'full';
    driver.queues[TX]?.send([join(header(), frame(60))]);
    backend.arrive(join(header(), frame(99))); // which finds no buffers: lost, as any frame may be
    rig.pump();

    const other = new FakeBackend();
    const state = driver.move(rig.device(other));
    expect(state.device).toEqual({ up: true });
    expect(other.offloadsSet.at(-1)).toBe(Offload.checksum);
    expect(other.sent.map((one) => one.frame)).toEqual([frame(60)]);
    expect(driver.queues[TX]?.completions()).toHaveLength(1);
    driver.queues[RX]?.send([2048]);
    other.arrive(join(header(), frame(70)));
    rig.pump();
    const [received] = driver.queues[RX]?.completions() ?? [];
    expect(received?.data.subarray(header().length, received.written)).toEqual(frame(70));
    expectDamageIsRefused(driver.transport.save(), () => {
      return new MockDriver(rig.device(new FakeBackend()), driver.memory).transport;
    });
  });

  test('frames that are there already come without anything more', () => {
    const { driver } = rig.driver(backend);
    driver.queues[RX]?.send([2048]);
    const other = new FakeBackend();
    other.incoming.push(join(header(), frame(80)));
    driver.move(rig.device(other));
    rig.pump();
    expect(driver.queues[RX]?.completions()).toHaveLength(1);
  });

  test.each([
    [true, false],
    [false, true],
    [true, true],
    [false, false],
  ])('the guest hears of a link that is another: up %s, then %s', (before, after) => {
    const { driver } = rig.driver(backend, { features: BASIC });
    if (!before) backend.onDown();
    driver.acknowledge();
    const other = new FakeBackend();
    other.up = after;
    driver.move(rig.device(other));
    expect(driver.acknowledge() & abi.VIRTIO_MMIO_INT_CONFIG).toBe(before === after ? 0 : abi.VIRTIO_MMIO_INT_CONFIG);
    expect(driver.readConfig(abi.virtio_net_config.status, 1)).toEqual(Uint8Array.of(after ? 1 : 0));
  });

  test('a backend that lacks an offload which the guest uses is refused', () => {
    const { driver } = rig.driver(backend);
    const other = new FakeBackend();
    other.offloads = 0;
    expect(() => driver.move(rig.device(other))).toThrow(/device.driverFeatures are not what this device offers here/);
  });
});
