import { describe, expect, test } from 'vitest';
import * as abi from '#dist/virtio/generated/virtio.js';
import { MockDriver, type MockQueue } from '../../support/virtio/mock-driver.js';
import { RecordingDevice } from '../../support/virtio/recording-device.js';

const { VIRTIO_CONFIG_S_NEEDS_RESET: NEEDS_RESET, VIRTIO_CONFIG_S_DRIVER_OK: DRIVER_OK } = abi;
const { VIRTIO_MMIO_INT_VRING: VRING, VIRTIO_MMIO_INT_CONFIG: CONFIG } = abi;
const QUEUE_RESET = 0xc0;
const SHM_SEL = 0xac;
const READABLE: Record<number, number> = {
  [abi.VIRTIO_MMIO_MAGIC_VALUE]: 0x7472_6976,
  [abi.VIRTIO_MMIO_VERSION]: 2,
  [abi.VIRTIO_MMIO_DEVICE_ID]: 42,
  [abi.VIRTIO_MMIO_VENDOR_ID]: 0x76_7374,
  [abi.VIRTIO_MMIO_DEVICE_FEATURES]: 0x3000_0005,
  [abi.VIRTIO_MMIO_QUEUE_NUM_MAX]: 8,
  [abi.VIRTIO_MMIO_SHM_LEN_LOW]: 0xffff_ffff,
  [abi.VIRTIO_MMIO_SHM_LEN_HIGH]: 0xffff_ffff,
  [abi.VIRTIO_MMIO_SHM_BASE_LOW]: 0xffff_ffff,
  [abi.VIRTIO_MMIO_SHM_BASE_HIGH]: 0xffff_ffff,
};
const setUpRegisters = [
  abi.VIRTIO_MMIO_QUEUE_NUM,
  abi.VIRTIO_MMIO_QUEUE_DESC_LOW,
  abi.VIRTIO_MMIO_QUEUE_DESC_HIGH,
  abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW,
  abi.VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
  abi.VIRTIO_MMIO_QUEUE_USED_LOW,
  abi.VIRTIO_MMIO_QUEUE_USED_HIGH,
];

/** Selects a queue and reads whether it is ready. */
function ready(driver: MockDriver, queue = 0): number {
  driver.write32(abi.VIRTIO_MMIO_QUEUE_SEL, queue);
  return driver.read32(abi.VIRTIO_MMIO_QUEUE_READY);
}

describe('4.2.2.1: registers', () => {
  test('read as they are at power-on; what is write-only, reserved or of the legacy interface reads as 0', () => {
    const driver = new MockDriver(new RecordingDevice({ features: 5n }));
    for (let offset = 0; offset < 0x100; offset += 4) {
      expect(driver.read32(offset), `register ${offset.toString(16)}`).toBe(READABLE[offset] ?? 0);
    }
  });

  test('answer 32-bit aligned accesses alone', () => {
    const driver = MockDriver.ready(new RecordingDevice());
    for (let offset = 0; offset < 0x100; offset++) {
      for (const width of [1, 2, 4, 8]) {
        if (width === 4 && offset % 4 === 0) continue;
        const data = new Uint8Array(width).fill(0xee);
        driver.transport.read(offset, data);
        expect([...data]).toEqual(new Array(width).fill(0xee));
        driver.transport.write(offset, new Uint8Array(width));
      }
    }
    expect(driver.status & DRIVER_OK).toBe(DRIVER_OK); // zeroes over Status did not reset it
    expect([ready(driver, 0), ready(driver, 1)]).toEqual([1, 1]);
    expect(driver.broken).toEqual([]);
  });

  test('that are read-only or not there ignore what is written', () => {
    const device = new RecordingDevice({ features: 5n });
    const driver = new MockDriver(device);
    const writable = new Set<number>([
      ...setUpRegisters,
      abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL,
      abi.VIRTIO_MMIO_DRIVER_FEATURES,
      abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL,
      abi.VIRTIO_MMIO_QUEUE_SEL,
      abi.VIRTIO_MMIO_QUEUE_READY,
      abi.VIRTIO_MMIO_STATUS,
    ]);
    for (let offset = 0; offset < 0x100; offset += 4) {
      if (!writable.has(offset)) driver.write32(offset, 0xffff_ffff);
    }
    for (let offset = 0; offset < 0x100; offset += 4) {
      expect(driver.read32(offset), `register ${offset.toString(16)}`).toBe(READABLE[offset] ?? 0);
    }
    expect(device.calls).toEqual([]);
  });

  test('of shared memory and queue reset say that there is none', () => {
    const driver = new MockDriver(new RecordingDevice());
    driver.write32(SHM_SEL, 1);
    expect(driver.read32(abi.VIRTIO_MMIO_SHM_LEN_LOW)).toBe(0xffff_ffff);
    driver.write32(QUEUE_RESET, 1);
    expect(driver.read32(QUEUE_RESET)).toBe(0);
  });

  test('of features show 32 bits each, and none past 63', () => {
    const driver = new MockDriver(new RecordingDevice({ features: 0x8000_0001n }));
    const words = [0, 1, 2, 3, 4, 0x8000_0000, 0xffff_ffff].map((selector) => {
      driver.write32(abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, selector);
      return driver.read32(abi.VIRTIO_MMIO_DEVICE_FEATURES);
    });
    expect(words).toEqual([0xb000_0001, 1, 0, 0, 0, 0, 0]);
  });

  test('of queues are those of the queue selected', () => {
    const driver = new MockDriver(new RecordingDevice({ queueSizes: [8, 32768, 1] }));
    const sizes = [0, 1, 2, 3, 0xffff_ffff].map((queue) => {
      driver.write32(abi.VIRTIO_MMIO_QUEUE_SEL, queue);
      return driver.read32(abi.VIRTIO_MMIO_QUEUE_NUM_MAX);
    });
    expect(sizes).toEqual([8, 32768, 1, 0, 0]);
    driver.setUpQueue(2, 1);
    expect([ready(driver, 0), ready(driver, 1), ready(driver, 2), ready(driver, 3)]).toEqual([0, 0, 1, 0]);
    driver.setUpQueue(3, 8); // there is none
    expect(ready(driver, 3)).toBe(0);
    expect(driver.status).toBe(0);
  });
});

describe('4.2.2.1: interrupt status', () => {
  function interrupting() {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device, { features: 0n });
    const [queue] = driver.queues as [MockQueue];
    const status = () => driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS);
    const acknowledge = (value: number) => driver.write32(abi.VIRTIO_MMIO_INTERRUPT_ACK, value);
    return { device, driver, queue, status, acknowledge };
  }

  test('has a bit for each event until the driver acknowledges it; the line is high as long, and up anew for what is left', () => {
    const { device, driver, queue, status, acknowledge } = interrupting();
    expect([status(), driver.level]).toEqual([0, false]);
    queue.send([1]);
    expect([status(), driver.level]).toEqual([VRING, true]);
    device.context.configChanged();
    expect([status(), driver.level]).toEqual([VRING | CONFIG, true]);
    expect(driver.interrupts).toBe(1);
    acknowledge(VRING);
    expect([status(), driver.level, driver.interrupts]).toEqual([CONFIG, true, 2]);
    queue.send([1]);
    acknowledge(CONFIG);
    expect([status(), driver.level, driver.interrupts]).toEqual([VRING, true, 3]);
    acknowledge(VRING);
    expect([status(), driver.level]).toEqual([0, false]);
    expect(driver.interrupts).toBe(3);
    queue.send([1]);
    expect(driver.interrupts).toBe(4);
  });

  test('keeps its line high for events that come while it is', () => {
    const { driver, queue, acknowledge } = interrupting();
    for (let i = 0; i < 5; i++) queue.send([1]);
    expect([driver.interrupts, driver.level]).toEqual([1, true]);
    acknowledge(VRING);
    expect(driver.level).toBe(false);
  });

  test('is acknowledged by the bits that are set, no others', () => {
    const { driver, queue, status, acknowledge } = interrupting();
    queue.send([1]);
    acknowledge(0);
    acknowledge(CONFIG);
    acknowledge(0xffff_fffe);
    expect([status(), driver.interrupts]).toEqual([VRING, 1]);
    acknowledge(0xffff_ffff);
    expect(status()).toBe(0);
  });

  test('and QueueReady of every queue are cleared by a reset', () => {
    const { device, driver, queue, status } = interrupting();
    queue.send([1]);
    device.context.configChanged();
    driver.status = 0;
    expect([status(), driver.level]).toEqual([0, false]);
    expect([ready(driver, 0), ready(driver, 1)]).toEqual([0, 0]);
  });
});

describe('4.2.2.1: ConfigGeneration', () => {
  test('changes with the configuration, at any time, and does not go back', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    const generation = () => driver.read32(abi.VIRTIO_MMIO_CONFIG_GENERATION);
    const seen = [generation()];
    device.context.configChanged();
    seen.push(generation());
    driver.queues[0]?.request([1]);
    expect(generation()).toBe(seen[1]);
    driver.status = 0;
    expect(generation()).toBe(seen[1]);
    device.context.configChanged();
    seen.push(generation());
    expect(new Set(seen).size).toBe(3);
    expect([driver.level, driver.status]).toEqual([false, 0]); // no driver, no notification
  });
});

describe('4.2.2.1: QueueReady', () => {
  test('when zero, keeps the device from the queue', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    const [queue, other] = driver.queues as [MockQueue, MockQueue];
    device.onQueue = () => {};
    queue.send([10]);
    const [chain] = device.take(0);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 0);
    expect(driver.read32(abi.VIRTIO_MMIO_QUEUE_READY)).toBe(0);
    const calls = device.calls.length;
    queue.send([10]);
    expect(device.calls).toHaveLength(calls);
    expect(device.take(0)).toEqual([]);
    if (chain) device.context.queues[0]?.push(chain, 1);
    device.context.queues[0]?.publish();
    expect(queue.usedIndex).toBe(0);
    expect(driver.level).toBe(false);
    // Only a reset makes it ready again (VIRTIO_F_RING_RESET is not offered); the other queue goes on.
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 1);
    expect(driver.read32(abi.VIRTIO_MMIO_QUEUE_READY)).toBe(0);
    device.onQueue = undefined;
    other.request([10]);
    expect(driver.status & NEEDS_RESET).toBe(0);
  });

  test('has one bit', () => {
    const driver = new MockDriver(new RecordingDevice());
    driver.setUpQueue(0, 8);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 2);
    expect(ready(driver)).toBe(0);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 3);
    expect(ready(driver)).toBe(1);
  });
});

describe('4.2.3.2: the set-up of a queue', () => {
  const placement = (driver: MockDriver) => (driver.transport.save().queues as unknown[])[0];

  test('keeps the halves of an address as they are written, in any order', () => {
    const driver = new MockDriver(new RecordingDevice());
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NUM, 8);
    const addresses = [
      [abi.VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000],
      [abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2002],
      [abi.VIRTIO_MMIO_QUEUE_USED_LOW, 0x3004],
    ] as const;
    for (const [register, address] of addresses) {
      driver.write32(register + 4, 0xffff_ffff);
      driver.write32(register, address);
      driver.write32(register + 4, 0);
    }
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 1);
    expect(ready(driver)).toBe(1);
    expect(placement(driver)).toMatchObject({ size: 8, descriptors: 0x1000, available: 0x2002, used: 0x3004 });
  });

  test('stays as it is while the queue is ready', () => {
    const driver = new MockDriver(new RecordingDevice());
    driver.setUpQueue(0, 4);
    const before = placement(driver);
    for (const register of setUpRegisters) driver.write32(register, 1);
    expect(placement(driver)).toEqual(before);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 1);
    expect([ready(driver), driver.status]).toEqual([1, 0]);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 0);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NUM, 2);
    expect(placement(driver)).toMatchObject({ size: 2, ready: false });
  });

  test('is over with DRIVER_OK, for queues that were not set up too', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    driver.negotiate();
    driver.setUpQueue(0, 8);
    driver.status |= DRIVER_OK;
    const before = driver.transport.save().queues;
    driver.setUpQueue(1, 8);
    expect(ready(driver, 1)).toBe(0);
    expect(driver.transport.save().queues).toEqual(before);
    device.calls.length = 0;
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    expect(device.calls).toEqual([]);
    expect(device.take(1)).toEqual([]);
  });

  test('may be with fewer descriptors than the maximum', () => {
    for (const size of [1, 2, 128, 256]) {
      const driver = MockDriver.ready(new RecordingDevice({ queueSizes: [256] }), { queueSizes: [size] });
      for (let i = 0; i < size + 1; i++) driver.queues[0]?.request([1]);
      expect(driver.broken).toEqual([]);
    }
  });

  const RAM = 8 << 20;
  const bad: readonly (readonly [name: string, register: number, value: number])[] = [
    ['a size of 0', abi.VIRTIO_MMIO_QUEUE_NUM, 0],
    ['a size of 3', abi.VIRTIO_MMIO_QUEUE_NUM, 3],
    ['a size over the maximum', abi.VIRTIO_MMIO_QUEUE_NUM, 16],
    ['a size of 2^31', abi.VIRTIO_MMIO_QUEUE_NUM, 2 ** 31],
    ['a size of 2^16 + 8', abi.VIRTIO_MMIO_QUEUE_NUM, 0x1_0008],
    ['a misaligned descriptor table', abi.VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008],
    ['a misaligned available ring', abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x1001],
    ['a misaligned used ring', abi.VIRTIO_MMIO_QUEUE_USED_LOW, 0x1002],
    ['a descriptor table over the end of RAM', abi.VIRTIO_MMIO_QUEUE_DESC_LOW, RAM - 112],
    ['an available ring over the end of RAM', abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, RAM - 20],
    ['a used ring over the end of RAM', abi.VIRTIO_MMIO_QUEUE_USED_LOW, RAM - 68],
    ['a descriptor table above 4 GiB', abi.VIRTIO_MMIO_QUEUE_DESC_HIGH, 1],
    ['an available ring above 2^53', abi.VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 2 ** 21],
    ['a used ring at the end of 64 bits', abi.VIRTIO_MMIO_QUEUE_USED_HIGH, 0xffff_ffff],
  ];

  test.each(bad)('with %s needs a reset, and a reset mends it', (_, register, value) => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    driver.negotiate();
    driver.setUpQueue(0, 8);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 0);
    driver.write32(register, value);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 1);
    expect(ready(driver)).toBe(0);
    expect(driver.status & NEEDS_RESET).toBe(NEEDS_RESET);
    expect(driver.broken).toHaveLength(1);
    expect(driver.broken[0]).toMatch(/^virtio test: its driver set up an? .*; the device waits for a reset$/);
    // 2.1.2: the notification is sent once DRIVER_OK is set.
    expect(driver.level).toBe(false);
    driver.status |= DRIVER_OK;
    expect(driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS)).toBe(CONFIG);
    expect(driver.level).toBe(true);
    expect(device.calls).toEqual(['reset']);
    driver.initialize();
    driver.queues[0]?.request([1]);
    expect(driver.broken).toHaveLength(1);
  });
});

describe('4.2.3.3: a notification', () => {
  test('has the device look at that queue alone', () => {
    const device = new RecordingDevice({ queueSizes: [8, 8, 8] });
    const driver = MockDriver.ready(device);
    device.calls.length = 0;
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, 2);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    expect(device.calls).toEqual(['queue 2', 'queue 0']);
  });

  test.each([3, 4, 0x1_0000, 0x1_0001, 0x8000_0000, 0xffff_ffff])('of queue %d, which is none, is ignored', (index) => {
    const device = new RecordingDevice({ queueSizes: [8, 8, 8] });
    const driver = MockDriver.ready(device);
    device.calls.length = 0;
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, index);
    expect(device.calls).toEqual([]);
    expect(driver.broken).toEqual([]);
  });

  test('is ignored before DRIVER_OK and after DEVICE_NEEDS_RESET', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    driver.negotiate();
    driver.setUpQueue(0, 8);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    expect(device.calls).toEqual(['reset']);
    driver.status |= DRIVER_OK;
    expect(device.calls).toEqual(['reset', 'activate', 'queue 0']);
    device.context.fail('enough');
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    expect(device.calls).toHaveLength(3);
  });

  test('without cause is harmless (2.7.10.2)', () => {
    const driver = MockDriver.ready(new RecordingDevice());
    for (let i = 0; i < 100; i++) driver.queues[0]?.notify();
    expect([driver.interrupts, driver.queues[0]?.usedIndex]).toEqual([0, 0]);
  });
});

describe('4.2.2.2: the configuration space', () => {
  const config = Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10);

  test('is read with every width at every offset; past its end is nothing', () => {
    const driver = new MockDriver(new RecordingDevice({ config }));
    for (const width of [1, 2, 4, 8]) {
      for (let offset = 0; offset < 20; offset++) {
        const expected = Array.from({ length: width }, (_, i) => config[offset + i] ?? 0xff);
        expect([...driver.readConfig(offset, width)]).toEqual(expected);
      }
    }
    expect([...driver.readConfig(0x1000 - 0x100 - 8, 8)]).toEqual(new Array(8).fill(0xff));
  });

  test('2.5.2: is read before FEATURES_OK, and after a failure', () => {
    const device = new RecordingDevice({ config });
    const driver = new MockDriver(device);
    expect([...driver.readConfig(2, 1)]).toEqual([3]);
    driver.initialize();
    device.context.fail('enough');
    expect([...driver.readConfig(2, 1)]).toEqual([3]);
  });

  test('is written as the driver does it', () => {
    const device = new RecordingDevice({ config });
    const driver = new MockDriver(device);
    for (const width of [1, 2, 4, 8]) driver.writeConfig(3, config.subarray(0, width));
    expect(device.calls).toEqual(['write 3: 1', 'write 3: 1 2', 'write 3: 1 2 3 4', 'write 3: 1 2 3 4 5 6 7 8']);
  });

  test('of a device that takes no writes ignores them', () => {
    const device = Object.assign(new RecordingDevice({ config }), { writeConfig: undefined });
    const driver = new MockDriver(device as never);
    driver.writeConfig(0, config);
    expect(driver.broken).toEqual([]);
  });
});
