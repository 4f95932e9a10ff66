import { describe, expect, test } from 'vitest';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { MockDriver, type MockQueue } from '../../support/virtio/mock-driver.js';
import { RecordingDevice } from '../../support/virtio/recording-device.js';

const { VIRTIO_CONFIG_S_ACKNOWLEDGE: ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER: DRIVER } = abi;
const { VIRTIO_CONFIG_S_FEATURES_OK: FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK: DRIVER_OK } = abi;
const { VIRTIO_CONFIG_S_NEEDS_RESET: NEEDS_RESET, VIRTIO_CONFIG_S_FAILED: FAILED } = abi;
const VERSION_1 = feature(abi.VIRTIO_F_VERSION_1);
const READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

describe('2.1: the device status', () => {
  test('goes from 0 through the steps of 3.1.1', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    expect(driver.status).toBe(0);
    driver.writeFeatures(VERSION_1);
    let expected = 0;
    for (const bit of [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK]) {
      expect(device.calls).toEqual([]);
      expected |= bit;
      driver.status = expected;
      expect(driver.status).toBe(expected);
    }
    expect(device.calls).toEqual(['activate']);
  });

  test('2.1.1: loses no bit but by a reset', () => {
    const driver = MockDriver.ready(new RecordingDevice());
    driver.status = READY | FAILED;
    for (const bit of [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED]) {
      driver.status = (READY | FAILED) & ~bit;
      expect(driver.status).toBe(READY | FAILED);
    }
    driver.status = 0x100; // nothing that it knows, and no reset
    expect(driver.status).toBe(READY | FAILED);
    driver.status = 0;
    expect(driver.status).toBe(0);
  });

  test('has no bits but those defined; DEVICE_NEEDS_RESET is not the driver’s', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    driver.status = 0xffff_ff00 | 16 | 32 | NEEDS_RESET | ACKNOWLEDGE;
    expect(driver.status).toBe(ACKNOWLEDGE);
    driver.initialize();
    device.context.fail('enough');
    driver.status = READY;
    expect(driver.status).toBe(READY | NEEDS_RESET);
  });

  test('has DRIVER_OK only after FEATURES_OK; the device starts once', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    driver.writeFeatures(VERSION_1);
    driver.status = ACKNOWLEDGE | DRIVER | DRIVER_OK;
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER);
    expect(device.calls).toEqual([]);
    driver.status = READY;
    expect(driver.status).toBe(READY);
    driver.status = READY;
    driver.status = READY | FAILED;
    expect(device.calls).toEqual(['activate']);
  });
});

describe('2.1.2: the device', () => {
  test('uses nothing before DRIVER_OK, and then what was made available before', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    driver.negotiate();
    const queues = [driver.setUpQueue(0, 8), driver.setUpQueue(1, 8)];
    for (const queue of queues) queue.send([4]);
    expect(queues.map(({ usedIndex }) => usedIndex)).toEqual([0, 0]);
    expect(driver.level).toBe(false);
    driver.status |= DRIVER_OK;
    expect(device.calls).toEqual(['reset', 'activate', 'queue 0', 'queue 1']);
    expect(queues.map(({ usedIndex }) => usedIndex)).toEqual([1, 1]);
    expect(driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS)).toBe(abi.VIRTIO_MMIO_INT_VRING);
  });

  test('that cannot go on says so by status, interrupt and configuration generation, once', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    const [first, second] = driver.queues as [MockQueue, MockQueue];
    const generation = driver.read32(abi.VIRTIO_MMIO_CONFIG_GENERATION);
    first.makeAvailable(8); // there is none
    first.notify();
    expect(driver.status).toBe(READY | NEEDS_RESET);
    expect(driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS)).toBe(abi.VIRTIO_MMIO_INT_CONFIG);
    expect(driver.level).toBe(true);
    expect(driver.read32(abi.VIRTIO_MMIO_CONFIG_GENERATION)).not.toBe(generation);
    expect(driver.broken).toEqual([
      'virtio test: its driver made descriptor 8 of a table of 8; the device waits for a reset',
    ]);
    // All its queues end.
    second.send([4]);
    device.useAll(1);
    expect(second.usedIndex).toBe(0);
    device.context.fail('again');
    expect(driver.acknowledge()).toBe(abi.VIRTIO_MMIO_INT_CONFIG);
    device.context.fail('and again');
    expect(driver.level).toBe(false);
    expect(driver.broken).toHaveLength(1);
    // It says it again in the next initialization.
    driver.initialize();
    expect(driver.status).toBe(READY);
    driver.queues[0]?.request([4]);
    device.context.fail('this time');
    expect(driver.broken[1]).toBe('virtio test: this time; the device waits for a reset');
  });
});

describe('2.2.2: features', () => {
  const optional = feature(3) | feature(50);

  test('6.1: VERSION_1, indirect descriptors and EVENT_IDX are offered with those of the device, and nothing else', () => {
    const rings = feature(abi.VIRTIO_RING_F_INDIRECT_DESC) | feature(abi.VIRTIO_RING_F_EVENT_IDX);
    expect(new MockDriver(new RecordingDevice({ features: optional })).offered).toBe(optional | rings | VERSION_1);
  });

  test('a feature that was not offered is refused, whatever its number', () => {
    const driver = new MockDriver(new RecordingDevice({ features: 1n }));
    for (const bit of [1, 27, 30, 31, 33, 34, 63, 64, 127]) {
      driver.status = 0;
      driver.writeFeatures(driver.offered | feature(bit));
      driver.status = FEATURES_OK;
      expect(driver.status, `bit ${bit}`).toBe(0);
      driver.negotiate();
      expect(driver.status & FEATURES_OK, `after bit ${bit}`).toBe(FEATURES_OK);
    }
  });

  test('6.1: a driver without VERSION_1 is refused', () => {
    const driver = new MockDriver(new RecordingDevice());
    driver.writeFeatures(driver.offered & ~VERSION_1);
    driver.status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER);
    driver.writeFeatures(VERSION_1); // it may try again
    driver.status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER | FEATURES_OK);
  });

  test('any subset is accepted, and again after a reset', () => {
    const device = new RecordingDevice({ features: optional });
    const driver = new MockDriver(device);
    const bits = [feature(3), feature(50), feature(28), feature(29)];
    for (let set = 0; set < 16; set++) {
      const features = bits.reduce((all, bit, i) => (set & (1 << i) ? all | bit : all), VERSION_1);
      for (let time = 0; time < 2; time++) {
        driver.negotiate(features);
        driver.status |= DRIVER_OK;
        expect(driver.status).toBe(READY);
        expect(device.context.features).toBe(features & optional); // the transport's are not the device's business
      }
    }
  });

  test('that the device cannot combine are refused', () => {
    const device = new RecordingDevice({ features: optional });
    const asked: bigint[] = [];
    device.acceptsFeatures = (features) => {
      asked.push(features);
      return features === optional;
    };
    const driver = new MockDriver(device);
    driver.negotiate(VERSION_1 | feature(3));
    expect(driver.status & FEATURES_OK).toBe(0);
    driver.negotiate(VERSION_1 | optional);
    expect(driver.status & FEATURES_OK).toBe(FEATURES_OK);
    expect(asked).toEqual([feature(3), optional]);
  });

  test('2.2.1: stay as they are after FEATURES_OK', () => {
    const device = new RecordingDevice({ features: optional });
    const driver = new MockDriver(device);
    driver.negotiate(VERSION_1 | feature(3));
    driver.writeFeatures(VERSION_1 | feature(50));
    driver.status |= DRIVER_OK;
    driver.writeFeatures(0n);
    expect(device.context.features).toBe(feature(3));
    driver.negotiate(VERSION_1);
    driver.status |= DRIVER_OK;
    expect(device.context.features).toBe(0n);
  });

  test('of a word that there is none are not taken', () => {
    const driver = new MockDriver(new RecordingDevice());
    driver.writeFeatures(VERSION_1);
    for (const selector of [4, 32, 0x8000_0000, 0xffff_ffff]) {
      driver.write32(abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL, selector);
      driver.write32(abi.VIRTIO_MMIO_DRIVER_FEATURES, 0xffff_ffff);
    }
    driver.status = FEATURES_OK;
    expect(driver.status).toBe(FEATURES_OK);
  });

  test('of the rings are in force only if they were negotiated', () => {
    const event = feature(abi.VIRTIO_RING_F_EVENT_IDX);
    const indirect = feature(abi.VIRTIO_RING_F_INDIRECT_DESC);
    const without = MockDriver.ready(new RecordingDevice(), { features: event });
    without.queues[0]?.send([4], { indirect: true });
    expect(without.broken[0]).toMatch(/its driver made an indirect descriptor, which was not negotiated/);
    const driver = MockDriver.ready(new RecordingDevice(), { features: indirect });
    const [queue] = driver.queues as [MockQueue];
    queue.usedEvent = 7;
    queue.request([4], { indirect: true });
    expect(driver.interrupts).toBe(1);
    const suppressed = MockDriver.ready(new RecordingDevice(), { features: event });
    const [quiet] = suppressed.queues as [MockQueue];
    quiet.usedEvent = 7;
    quiet.request([4]);
    expect([suppressed.interrupts, quiet.availEvent]).toEqual([0, 1]);
  });
});

describe('2.4.1: a reset', () => {
  test('ends notifications and queues before the device hears of it', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    const [queue] = driver.queues as [MockQueue];
    queue.request([4]);
    device.onQueue = () => {};
    queue.send([4]);
    const chains = device.take(0);
    const { context } = device;
    device.onReset = () => {
      expect([driver.level, driver.status]).toEqual([false, 0]);
      expect(context.queues.map(({ alive }) => alive)).toEqual([false, false]);
    };
    driver.status = 0;
    expect(device.calls.at(-1)).toBe('reset');
    for (const chain of chains) context.queues[0]?.push(chain, 4);
    context.queues[0]?.publish();
    queue.send([4]);
    expect([queue.usedIndex, driver.level]).toEqual([1, false]);
    expect(driver.broken).toEqual([]);
  });

  test('leaves nothing of the time before', () => {
    const device = new RecordingDevice({ features: feature(3) });
    const driver = MockDriver.ready(device);
    driver.queues[0]?.request([4]);
    driver.write32(abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_SEL, 1);
    driver.status = 0;
    const { configGeneration, ...state } = driver.transport.save();
    const { configGeneration: _, ...fresh } = new MockDriver(device).transport.save();
    expect(state).toEqual(fresh);
  });

  test('is done by the machine’s reset, too', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    driver.queues[0]?.request([4]);
    driver.transport.reset();
    expect([driver.status, driver.level, device.calls.at(-1)]).toEqual([0, false, 'reset']);
  });

  test('is an end to what a device says of the initialization before', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    const { context } = device;
    driver.status = 0;
    context.fail('late');
    expect(driver.status).toBe(0);
    driver.initialize();
    context.fail('later');
    expect(driver.status).toBe(READY);
    device.context.fail('now');
    expect(driver.status).toBe(READY | NEEDS_RESET);
    expect(driver.broken).toEqual(['virtio test: now; the device waits for a reset']);
  });
});

describe('a reset from inside', () => {
  test('handleQueue ends what it does', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    const [queue] = driver.queues as [MockQueue];
    device.onQueue = (index) => {
      const chain = device.context.queues[index]?.pop();
      driver.status = 0;
      if (chain) device.context.queues[index]?.push(chain, 1);
      expect(device.context.queues[index]?.pop()).toBeUndefined();
      device.context.queues[index]?.publish();
    };
    queue.add([4]);
    queue.send([4]);
    expect([driver.status, queue.usedIndex, driver.level]).toEqual([0, 0, false]);
    expect(driver.broken).toEqual([]);
  });

  test('handleQueue may be followed by an initialization, whose queues then work', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    const [old] = driver.queues as [MockQueue];
    device.onQueue = (index) => {
      device.onQueue = undefined;
      const { context } = device;
      const chain = context.queues[index]?.pop();
      driver.initialize();
      if (chain) context.queues[index]?.push(chain, 1);
      context.queues[index]?.publish();
      context.fail('not of this time');
    };
    old.send([4]);
    expect(driver.status).toBe(READY);
    driver.queues[0]?.request([4]);
    expect(old.usedIndex).toBe(0);
    expect(driver.broken).toEqual([]);
  });

  test('activate leaves the device reset', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    device.onActivate = () => {
      driver.status = 0;
    };
    driver.initialize();
    expect(driver.status).toBe(0);
    expect(device.calls).toEqual(['reset', 'activate', 'reset']);
  });

  test('a first queue’s handler, at DRIVER_OK, keeps the others from being served', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    device.onQueue = () => {
      driver.status = 0;
    };
    driver.initialize();
    expect(device.calls).toEqual(['reset', 'activate', 'queue 0', 'reset']);
  });
});

describe('a device that throws', () => {
  const failing = () => {
    throw new Error('a defect');
  };

  test('in handleQueue is stopped', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    device.onQueue = failing;
    driver.queues[0]?.send([4]);
    expect(driver.status).toBe(READY | NEEDS_RESET);
    expect(driver.broken[0]).toMatch(
      /^virtio test: internal error: Error: a defect\n.*; the device waits for a reset$/s,
    );
    device.onQueue = undefined;
    driver.initialize();
    driver.queues[0]?.request([4]);
  });

  test('in activate is not given its queues', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    device.onActivate = failing;
    driver.initialize();
    expect(driver.status).toBe(READY | NEEDS_RESET);
    expect(device.calls).toEqual(['reset', 'activate']);
  });

  test('in reset needs another', () => {
    const device = new RecordingDevice();
    const driver = MockDriver.ready(device);
    device.onReset = failing;
    driver.status = 0;
    expect(driver.status).toBe(NEEDS_RESET);
    device.onReset = undefined;
    driver.initialize();
    expect(driver.status).toBe(READY);
  });

  test('in its configuration space is stopped, and the driver reads on', () => {
    const device = Object.assign(new RecordingDevice(), { readConfig: failing, writeConfig: failing });
    const driver = MockDriver.ready(device);
    expect([...driver.readConfig(0, 4)]).toEqual([0xff, 0xff, 0xff, 0xff]);
    expect(driver.status).toBe(READY | NEEDS_RESET);
    driver.initialize();
    driver.writeConfig(0, new Uint8Array(4));
    expect(driver.status).toBe(READY | NEEDS_RESET);
    expect(driver.broken).toHaveLength(2);
  });

  test('and fails in activate gets nothing to do', () => {
    const device = new RecordingDevice();
    const driver = new MockDriver(device);
    device.onActivate = () => device.context.fail('no backend');
    driver.initialize();
    expect(device.calls).toEqual(['reset', 'activate']);
    expect(driver.broken).toEqual(['virtio test: no backend; the device waits for a reset']);
    expect(driver.level).toBe(true);
  });
});
