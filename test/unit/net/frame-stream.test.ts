import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { FrameStream } from '#dist/backends/frame-stream.js';
import { FrameStreamDecoder, LENGTH_SIZE, putFrameLength } from '#dist/backends/frame-stream-format.js';
import { addon } from '#dist/kvm/addon.js';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { Offload } from '#dist/virtio/net/backend.js';
import { frame, header, join, NetRig, RX, TX } from './rig.js';

const EAGAIN = 11;

/** The other end of the stream: raw reads and writes. */
class Peer {
  readonly fd: number;
  readonly frames: Uint8Array[] = [];
  readonly controls: Uint8Array[] = [];
  intact = true;
  readonly #decoder = new FrameStreamDecoder({
    frame: (bytes) => this.frames.push(bytes.slice()),
    control: (bytes) => this.controls.push(bytes.slice()),
  });
  readonly #buffer = new Uint8Array(1 << 16);

  constructor(fd: number) {
    this.fd = fd;
  }

  /** Takes at most so many bytes. @returns how many there were. */
  read(most = Number.POSITIVE_INFINITY): number {
    for (let total = 0; ; ) {
      const wanted = Math.min(this.#buffer.length, most - total);
      const count = wanted > 0 ? addon.read(this.fd, this.#buffer, 0, wanted) : 0;
      if (count <= 0) return total;
      total += count;
      this.intact = this.#decoder.push(this.#buffer.subarray(0, count));
    }
  }

  /** @returns how many bytes the socket took. */
  write(bytes: Uint8Array): number {
    return addon.write(this.fd, bytes, 0, bytes.length);
  }

  /** Writes all of it while the other end is pumped. */
  async writeAll(bytes: Uint8Array, rig: NetRig): Promise<void> {
    let done = 0;
    await rig.until(() => {
      done += Math.max(0, this.write(bytes.subarray(done)));
      return done === bytes.length;
    });
  }
}

function message(bytes: Uint8Array): Uint8Array {
  const word = new Uint8Array(LENGTH_SIZE);
  putFrameLength(word, 0, bytes.length);
  return join(word, bytes);
}

let rig: NetRig;
let stream: FrameStream;
let peer: Peer;
let machineEnd: number;
beforeEach(() => {
  rig = new NetRig();
  const pair = addon.socketpair() as [number, number];
  machineEnd = pair[1];
  peer = new Peer(pair[0]);
  stream = new FrameStream(machineEnd, rig.events, Offload.checksum | Offload.tso4);
});
afterEach(() => {
  stream[Symbol.dispose]();
  addon.close(machineEnd);
  addon.close(peer.fd);
  rig[Symbol.dispose]();
});

function ready(features = ~0n) {
  const made = rig.driver(stream, { features });
  const [rx, tx] = made.driver.queues as [(typeof made.driver.queues)[0], (typeof made.driver.queues)[0]];
  return { ...made, rx, tx };
}

describe('from the guest', () => {
  test('frames and their headers arrive, after what the guest accepts', () => {
    const { net, tx } = ready();
    const partial = { flags: 1, csumStart: 34, csumOffset: 6 };
    tx.request([header(partial), frame(60)]);
    tx.request([header(), frame(1000).subarray(0, 500), frame(1000).subarray(500)]);
    peer.read();
    expect(peer.controls).toEqual([Uint8Array.of(1, 3)]);
    expect(peer.frames).toEqual([join(header(partial), frame(60)), join(header(), frame(1000))]);
    expect(net.counters).toMatchObject({ sentFrames: 2, sentBytes: 1060 });
  });

  test('the guest’s offloads are told when they change', () => {
    const { driver } = ready(feature(abi.VIRTIO_NET_F_GUEST_CSUM));
    peer.read();
    expect(peer.controls.splice(0)).toEqual([Uint8Array.of(1, 1)]);
    driver.initialize({ features: 0n });
    driver.initialize({ features: 0n });
    peer.read();
    expect(peer.controls.splice(0)).toEqual([Uint8Array.of(1, 0)]);
    driver.initialize();
    peer.read();
    expect(peer.controls).toEqual([Uint8Array.of(1, 3)]);
  });

  test.each([60, 1514, 65_550])(
    'a reader that is slow: frames of %d bytes wait in the queue, none is lost',
    async (length) => {
      const { net, driver, tx } = ready();
      const total = length > 10_000 ? 20 : 200;
      const size = 12 + length;
      const gpa = driver.allocate(size * total);
      for (let i = 0; i < total; i++) {
        driver.memory.write(gpa + i * size, join(header(), frame(length, i)));
        tx.writeDescriptor(tx.descriptors, i, gpa + i * size, size, 0, 0);
        tx.makeAvailable(i);
      }
      tx.notify();
      for (let i = 0; i < 20; i++) rig.pump();
      const stuck = tx.usedIndex;
      if (length > 60) expect(stuck).toBeLessThan(total);
      rig.pump();
      expect(tx.usedIndex).toBe(stuck);
      // A little at a time, so that messages are cut everywhere.
      await rig.until(() => {
        peer.read(length > 10_000 ? 7919 : 331);
        return peer.frames.length === total;
      });
      expect(tx.usedIndex).toBe(total);
      expect(peer.intact).toBe(true);
      peer.frames.forEach((bytes, i) => {
        expect(Buffer.from(bytes).equals(join(header(), frame(length, i)))).toBe(true);
      });
      expect(net.counters.sentFrames).toBe(total);
    },
  );

  test('the rest of a frame goes out by itself, and before the next one', async () => {
    const { tx } = ready();
    const frames = [60_000, 60_001, 60_002, 60_003, 60].map((length) => join(header(), frame(length)));
    for (const bytes of frames.slice(0, 4)) tx.request([bytes]);
    const first = peer.read();
    expect(first).toBeLessThan(240_000); // it was cut
    tx.request([frames[4] as Uint8Array]); // there is room again, and nobody has told the device
    await rig.until(() => {
      peer.read();
      return peer.frames.length === 5;
    });
    peer.frames.splice(0).forEach((bytes, i) => {
      expect(Buffer.from(bytes).equals(frames[i] as Uint8Array)).toBe(true);
    });
    for (const bytes of frames.slice(0, 4)) tx.request([bytes]);
    expect(peer.read()).toBeLessThan(240_000);
    await rig.until(() => {
      peer.read();
      return peer.frames.length === 4;
    });
  });

  test('a reset while the socket is full: the frame that was begun is ended, then the offloads follow', async () => {
    const { driver, tx } = ready();
    for (let i = 0; i < 8; i++) tx.add([header(), frame(60_000, i)]);
    tx.notify();
    const begun = tx.usedIndex;
    expect(begun).toBeLessThan(8);
    for (let i = 0; i < 1000; i++) driver.initialize({ features: BigInt(i & 1) << 1n });
    await rig.until(() => {
      peer.read();
      return peer.controls.length === 2;
    });
    rig.pump();
    peer.read();
    expect(peer.controls).toEqual([Uint8Array.of(1, 3), Uint8Array.of(1, 1)]);
    expect(peer.frames).toHaveLength(begun);
    driver.queues[TX]?.request([header(), frame(61)]);
    peer.read();
    expect(peer.frames.at(-1)).toEqual(join(header(), frame(61)));
  });
});

describe('to the guest', () => {
  test('frames in pieces of every size', async () => {
    const { rx } = ready();
    const frames = [26, 60, 1514].map((length, i) => join(header(), frame(length, i)));
    const bytes = join(...frames.map(message));
    for (const size of [1, 3, 4, 5, 16, 17, 100, bytes.length]) {
      for (const _ of frames) rx.add([2000]);
      rx.notify();
      const received: Uint8Array[] = [];
      for (let at = 0; at < bytes.length; at += size) {
        expect(peer.write(bytes.subarray(at, at + size))).toBe(Math.min(size, bytes.length - at));
        rig.pump();
      }
      await rig.until(() => {
        received.push(...rx.completions().map(({ data, written }) => data.subarray(0, written)));
        return received.length === 3;
      });
      expect(received.map((one) => one.subarray(12))).toEqual(frames.map((one) => one.subarray(12)));
    }
  });

  test('a guest without buffers: the sender waits, nothing is lost', async () => {
    const { net, rx } = ready();
    const frames = Array.from({ length: 3000 }, (_, i) => join(header(), frame(200 + (i % 1300), i)));
    const bytes = join(...frames.map(message));
    let sent = 0;
    for (let last = -1; last !== sent; ) {
      last = sent;
      for (let count = peer.write(bytes.subarray(sent)); count > 0; count = peer.write(bytes.subarray(sent)))
        sent += count;
      rig.pump();
    }
    expect(peer.write(bytes.subarray(sent))).toBe(-EAGAIN);
    expect(sent).toBeLessThan(1 << 20);
    let seen = 0;
    for (let i = 0; i < 200; i++) rx.add([1600]);
    rx.notify();
    await rig.until(() => {
      sent += Math.max(0, peer.write(bytes.subarray(sent)));
      for (const { data, written } of rx.completions()) {
        const expected = frames[seen++] as Uint8Array;
        if (!Buffer.from(data.subarray(12, written)).equals(expected.subarray(12)))
          throw new Error(`frame ${seen - 1}`);
        rx.send([1600]);
      }
      return seen === frames.length;
    });
    expect(sent).toBe(bytes.length);
    expect(net.counters).toMatchObject({ receivedFrames: 3000, receivedTooLong: 0, receivedBadHeader: 0 });
  });

  test('frames of the greatest length, one after the other', async () => {
    const { rx } = ready();
    for (let i = 0; i < 180; i++) rx.add([1526]);
    rx.notify();
    const long = Array.from({ length: 4 }, (_, i) => join(header(), frame(65_550, i)));
    await peer.writeAll(join(...long.map(message)), rig);
    await rig.until(() => rx.usedIndex === 4 * 43);
    const all = join(...rx.completions().map(({ data, written }) => data.subarray(0, written)));
    long.forEach((one, i) => {
      expect(Buffer.from(all.subarray(i * 65_562 + 12, (i + 1) * 65_562)).equals(one.subarray(12))).toBe(true);
    });
  });

  test('another device on the same stream, after the guest was reset, goes on where it was', async () => {
    const { rx, tx } = ready();
    const frames = [60_000, 60_001, 60_002, 60_003].map((length) => join(header(), frame(length)));
    for (const bytes of frames) tx.request([bytes]);
    rx.send([2000]);
    const late = message(join(header(), frame(100, 2)));
    peer.write(join(message(join(header(), frame(100, 1))), late.subarray(0, 50)));
    await rig.until(() => rx.usedIndex === 1);

    const next = ready();
    next.rx.send([2000]);
    peer.write(late.subarray(50));
    next.tx.send([join(header(), frame(70))]);
    await rig.until(() => {
      peer.read();
      return peer.frames.length === 5 && next.rx.usedIndex === 1;
    });
    expect(peer.frames.map((bytes) => bytes.length)).toEqual([60_012, 60_013, 60_014, 60_015, 82]);
    expect(next.rx.completions()[0]?.data.subarray(12, 112)).toEqual(frame(100, 2));
    expect(rx.usedIndex).toBe(1);
  });

  test('a driver that starts anew gets the frames that were already read', async () => {
    const { driver, rx } = ready();
    rx.send([2000]);
    peer.write(join(...[1, 2, 3].map((i) => message(join(header(), frame(100, i))))));
    await rig.until(() => rx.usedIndex === 1);
    driver.initialize();
    driver.queues[RX]?.send([2000]);
    await rig.until(() => driver.queues[RX]?.usedIndex === 1);
    expect(driver.queues[RX]?.completions()[0]?.data.subarray(12, 112)).toEqual(frame(100, 3));
  });
});

describe('the other end', () => {
  const linkDown = (driver: ReturnType<typeof ready>['driver']) =>
    driver.readConfig(abi.virtio_net_config.status, 2)[0] === 0;

  test.each([
    ['too long a frame', Uint8Array.of(0, 1, 0, 0x1b)],
    ['a control message', Uint8Array.of(0x80, 0, 0, 2, 1, 1)],
    ['a frame without a header', Uint8Array.of(0, 0, 0, 11)],
    ['an empty frame', Uint8Array.of(0, 0, 0, 0)],
  ])('sends %s: the link stops, the guest is told', async (_, bytes) => {
    const { net, driver, rx, tx } = ready();
    rx.send([2000]);
    peer.write(join(message(join(header(), frame(60))), bytes, new Uint8Array(1000)));
    await rig.until(() => linkDown(driver));
    expect(rx.completions()).toHaveLength(1);
    expect(driver.acknowledge() & abi.VIRTIO_MMIO_INT_CONFIG).not.toBe(0);
    tx.request([header(), frame(60)]);
    expect(net.counters.sentRefused).toBe(1);
    expect(stream.up).toBe(false);
    driver.initialize();
    expect(linkDown(driver)).toBe(true);
    driver.queues[TX]?.request([header(), frame(60)]);
  });

  test('is closed: the link stops', async () => {
    const { driver } = ready();
    addon.close(peer.fd);
    await rig.until(() => linkDown(driver));
    // It is not waited for any more: a hang-up would be reported for ever.
    let calls = 0;
    stream.onReadable = () => void calls++;
    driver.initialize();
    for (let i = 0; i < 20; i++) rig.pump();
    expect(calls).toBe(0);
  });

  test('is closed: the link stops; frames that waited for it are completed', async () => {
    const { net, driver, tx } = ready();
    for (let i = 0; i < 10; i++) tx.add([header(), frame(60_000, i)]);
    tx.notify();
    expect(tx.usedIndex).toBeLessThan(10);
    addon.close(peer.fd);
    await rig.until(() => linkDown(driver) && tx.usedIndex === 10);
    expect(net.counters.sentRefused).toBeGreaterThan(0);
  });
});
