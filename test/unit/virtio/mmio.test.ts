import { expect, test } from 'vitest';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { MockDriver, type MockQueue } from '../../support/virtio/mock-driver.js';
import { RecordingDevice } from '../../support/virtio/recording-device.js';

const { VIRTIO_CONFIG_S_FEATURES_OK: FEATURES_OK } = abi;

test('4.2.2.1: a queue whose QueueReady is zero is not accessed', () => {
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
  expect(driver.status & abi.VIRTIO_CONFIG_S_NEEDS_RESET).toBe(0);
});

test('4.2.2: halves of an address are kept as they are written, in any order', () => {
  const driver = new MockDriver(new RecordingDevice());
  driver.write32(abi.VIRTIO_MMIO_QUEUE_NUM, 8);
  for (const register of [
    abi.VIRTIO_MMIO_QUEUE_DESC_LOW,
    abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    abi.VIRTIO_MMIO_QUEUE_USED_LOW,
  ]) {
    driver.write32(register + 4, 0xffff_ffff);
    driver.write32(register, 0x1000 + 0x1000 * (register & 0x30));
    driver.write32(register + 4, 0);
  }
  driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 1);
  expect(driver.read32(abi.VIRTIO_MMIO_QUEUE_READY)).toBe(1);
  expect(driver.transport.save().queues).toMatchObject([
    { size: 8, descriptors: 0x1000, available: 0x1_1000, used: 0x2_1000 },
    {},
  ]);
});

test('2.1.2: a queue that cannot be is told of by DEVICE_NEEDS_RESET, and by an interrupt from DRIVER_OK on', () => {
  const device = new RecordingDevice();
  const driver = new MockDriver(device);
  driver.negotiate();
  driver.setUpQueue(0, 3);
  expect(driver.read32(abi.VIRTIO_MMIO_QUEUE_READY)).toBe(0);
  expect(driver.status & abi.VIRTIO_CONFIG_S_NEEDS_RESET).not.toBe(0);
  expect(driver.level).toBe(false);
  driver.status |= abi.VIRTIO_CONFIG_S_DRIVER_OK;
  expect(driver.level).toBe(true);
  expect(driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS)).toBe(abi.VIRTIO_MMIO_INT_CONFIG);
  expect(device.calls).toEqual(['reset']);
});

test('2.2.2: a feature that was not offered is refused, whatever its number', () => {
  const driver = new MockDriver(new RecordingDevice({ features: 1n }));
  for (const bit of [1, 31, 33, 63, 64, 127]) {
    driver.status = 0;
    driver.writeFeatures(driver.offered | feature(bit));
    driver.status = FEATURES_OK;
    expect(driver.status, `bit ${bit}`).toBe(0);
    driver.negotiate();
    expect(driver.status & FEATURES_OK, `after bit ${bit}`).toBe(FEATURES_OK);
  }
});

test('2.4: what a device says of an initialization that is over has no effect', () => {
  const device = new RecordingDevice();
  const driver = MockDriver.ready(device);
  const { context } = device;
  driver.status = 0;
  context.fail('late');
  expect(driver.status).toBe(0);
  driver.initialize();
  context.fail('later');
  expect(driver.status & abi.VIRTIO_CONFIG_S_NEEDS_RESET).toBe(0);
  device.context.fail('now');
  expect(driver.status & abi.VIRTIO_CONFIG_S_NEEDS_RESET).not.toBe(0);
  expect(driver.broken).toEqual(['virtio test: now; the device waits for a reset']);
});
