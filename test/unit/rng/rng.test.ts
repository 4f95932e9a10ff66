import { describe, expect, test } from 'vitest';
import * as abi from '#dist/virtio/generated/virtio.js';
import { Rng } from '#dist/virtio/rng/rng.js';
import { MockDriver, type MockQueue } from '../../support/virtio/mock-driver.js';

/** Most that one request gets. */
const MOST = 4096;

/** An entropy device whose clock and timer the test moves. */
class Rig {
  time = 1000;
  /** When the timer is due, in ms. */
  due: number | undefined;
  readonly driver: MockDriver;
  #expired = () => {};

  constructor(bytesPerSecond: number) {
    this.driver = new MockDriver(this.device(bytesPerSecond));
    this.driver.initialize();
  }

  /** Another one, of which the timer is from now on. */
  device(bytesPerSecond: number): Rng {
    return new Rng({
      bytesPerSecond,
      now: () => this.time,
      timer: (onExpired) => {
        this.#expired = onExpired;
        return {
          arm: (microseconds) => {
            expect(microseconds).toBeGreaterThanOrEqual(1);
            expect(microseconds).toBeLessThan(2 ** 32);
            this.due = this.time + microseconds / 1e3;
          },
        };
      },
    });
  }

  get queue(): MockQueue {
    return this.driver.queues[0] as MockQueue;
  }

  /** Lets time pass; the timer expires when it is due. */
  pass(ms: number): void {
    const end = this.time + ms;
    while (this.due !== undefined && this.due <= end) {
      this.time = this.due;
      this.due = undefined;
      this.#expired();
    }
    this.time = end;
  }

  /** Lets so much be taken that there is no credit. */
  exhaust(): void {
    while (this.due === undefined) {
      this.queue.send([MOST]);
      this.queue.completions();
    }
  }
}

describe('5.4 Entropy Device', () => {
  test('5.4.1 to 5.4.4: its type, one queue, no features, no configuration', () => {
    const { driver } = new Rig(65536);
    expect(driver.read32(abi.VIRTIO_MMIO_DEVICE_ID)).toBe(4);
    expect(driver.device.queueSizes).toHaveLength(1);
    expect(driver.device.features).toBe(0n);
    expect([...driver.readConfig(0, 4)]).toEqual([0xff, 0xff, 0xff, 0xff]);
    driver.writeConfig(0, new Uint8Array(8));
  });

  for (const size of [1, 2, 3, 7, 64, 4095, 4096, 4097, 65536, 1 << 20]) {
    test(`5.4.6.2 the device MUST place one or more random bytes into the buffer: of ${size}`, () => {
      const rig = new Rig(1 << 20);
      const { data, written } = rig.queue.request([size]);
      expect(written).toBe(Math.min(size, MOST));
      if (size >= 64) expect(new Set(data.subarray(0, written)).size).toBeGreaterThan(32);
      expect(data.subarray(written).every((byte) => byte === 0)).toBe(true);
    });
  }

  test('a request of many buffers is filled from its start', () => {
    const { data, written } = new Rig(65536).queue.request([1, 0, 100, 3, 200], { indirect: true });
    expect(written).toBe(304);
    for (const end of [101, 304]) expect(new Set(data.subarray(end - 100, end)).size).toBeGreaterThan(40);
  });

  test('no two requests get the same bytes, nor two devices', () => {
    const seen = new Set<string>();
    for (const rig of [new Rig(65536), new Rig(65536)]) {
      for (let i = 0; i < 100; i++) seen.add(Buffer.from(rig.queue.request([16]).data).toString('hex'));
    }
    expect(seen.size).toBe(200);
  });

  test('bits are even', () => {
    const rig = new Rig(1 << 20);
    let ones = 0;
    for (let i = 0; i < 64; i++)
      for (const byte of rig.queue.request([MOST]).data) ones += byte.toString(2).split('1').length - 1;
    // 2^21 bits: 8 standard deviations.
    expect(Math.abs(ones - 2 ** 20)).toBeLessThan(8 * Math.sqrt(2 ** 19));
  });

  test('requests of no bytes, or of memory that may only be read, come back empty', () => {
    const rig = new Rig(65536);
    expect(rig.queue.request([0]).written).toBe(0);
    expect(rig.queue.request([new Uint8Array(16)]).written).toBe(0);
    const { data, written } = rig.queue.request([new Uint8Array(16), 16]);
    expect(written).toBe(16);
    expect(data.some((byte) => byte !== 0)).toBe(true);
  });

  test('a whole queue of requests is one interrupt', () => {
    const rig = new Rig(1 << 20);
    for (let i = 0; i < 64; i++) rig.queue.add([8]);
    rig.queue.notify();
    expect(rig.queue.completions()).toHaveLength(64);
    expect(rig.driver.interrupts).toBe(1);
  });
});

describe('the rate', () => {
  test('is kept over any time; what comes too early waits', () => {
    const rate = 10_000;
    const rig = new Rig(rate);
    let bytes = 0;
    let waiting = 0;
    const take = () => {
      for (const { written } of rig.queue.completions()) {
        bytes += written;
        waiting--;
      }
      for (; waiting < 32; waiting++) rig.queue.add([1000]);
      rig.queue.notify();
    };
    for (let ms = 0; ms < 60_000; ms += 37) {
      take();
      rig.pass(37);
    }
    expect(bytes).toBeLessThanOrEqual(rate + 60 * rate);
    expect(bytes).toBeGreaterThan(59 * rate);
  });

  test('a pause is worth a second of it, not more', () => {
    const rig = new Rig(20_000);
    rig.exhaust();
    rig.pass(3_600_000);
    rig.queue.completions();
    rig.due = undefined;
    let bytes = 0;
    while (rig.due === undefined) {
      rig.queue.send([1000]);
      for (const { written } of rig.queue.completions()) bytes += written;
    }
    expect(bytes).toBe(20_000);
  });

  test('a request waits just as long as it must, then is whole', () => {
    const rig = new Rig(1000);
    rig.exhaust();
    rig.pass(10_000);
    rig.queue.completions();
    expect(rig.queue.request([4000]).written).toBe(4000);
    rig.queue.send([1096]); // 96 are left
    expect(rig.queue.completions()).toEqual([]);
    rig.pass(999);
    expect(rig.queue.completions()).toEqual([]);
    rig.pass(2);
    expect(rig.queue.completions().map(({ written }) => written)).toEqual([1096]);
  });

  test('waiting requests are served in their order, small ones too', () => {
    const rig = new Rig(1000);
    rig.exhaust();
    const heads = [rig.queue.send([1]), rig.queue.send([2000]), rig.queue.send([1])];
    rig.pass(60_000);
    expect(
      rig.queue
        .completions()
        .map(({ head }) => head)
        .slice(-3),
    ).toEqual(heads);
  });

  test('of a byte a second, and of 2^31', () => {
    const slow = new Rig(1);
    slow.exhaust();
    expect((slow.due as number) - slow.time).toBeCloseTo(MOST * 1000, -3);
    const fast = new Rig(2 ** 31);
    for (let i = 0; i < 1000; i++) expect(fast.queue.request([MOST]).written).toBe(MOST);
  });

  test('is not won back by a reset', () => {
    const rig = new Rig(1000);
    rig.exhaust();
    rig.driver.initialize();
    rig.queue.send([100]);
    rig.pass(99);
    expect(rig.queue.completions()).toEqual([]);
    rig.pass(2);
    expect(rig.queue.completions()).toHaveLength(1);
  });
});

describe('a reset', () => {
  test('requests that waited over it are not completed', () => {
    const rig = new Rig(1000);
    rig.exhaust();
    const old = rig.queue;
    const before = old.usedIndex;
    rig.driver.status = 0;
    rig.pass(60_000);
    expect(old.usedIndex).toBe(before);
    rig.driver.initialize();
    rig.pass(60_000);
    expect(old.usedIndex).toBe(before);
    expect(rig.queue.usedIndex).toBe(0);
    expect(rig.driver.level).toBe(false);
    expect(rig.queue.request([8]).written).toBe(8);
  });

  test('also when the ring was broken', () => {
    const rig = new Rig(1000);
    rig.exhaust();
    rig.queue.makeAvailable(0xffff);
    rig.pass(60_000);
    expect(rig.driver.broken).toHaveLength(1);
    rig.driver.initialize();
    expect(rig.queue.request([8]).written).toBe(8);
  });
});

test('a restored device serves what waits, at its rate', () => {
  const rig = new Rig(5000);
  rig.exhaust();
  rig.queue.send([MOST]);
  rig.due = undefined; // the timer goes with the machine that was saved
  rig.driver.move(rig.device(5000));
  // Its burst is 5000 bytes: one of the two that wait.
  expect(rig.queue.completions().map(({ written }) => written)).toEqual([MOST]);
  expect(rig.due).toBeGreaterThan(rig.time);
  rig.pass(1000);
  expect(rig.queue.completions().map(({ written }) => written)).toEqual([MOST]);
});
