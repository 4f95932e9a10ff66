import { describe, expect, test } from 'vitest';
import { StateReader } from '#dist/state-reader.js';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { type TransportState, VirtioMmio } from '#dist/virtio/transport/mmio.js';
import { expectDamageIsRefused } from '../../support/damaged-state.js';
import { MockDriver, type MockQueue } from '../../support/virtio/mock-driver.js';
import { RecordingDevice } from '../../support/virtio/recording-device.js';

const { VIRTIO_CONFIG_S_NEEDS_RESET: NEEDS_RESET, VIRTIO_CONFIG_S_DRIVER_OK: DRIVER_OK } = abi;
const OFFERED = { features: feature(3), queueSizes: [8, 8, 8] };

function ready(options: Parameters<MockDriver['initialize']>[0] = {}) {
  const device = new RecordingDevice(OFFERED);
  const driver = MockDriver.ready(device, options);
  return { device, driver, queues: driver.queues as [MockQueue, MockQueue, MockQueue] };
}

/** A device in the place of another, which goes on. */
function moved(driver: MockDriver) {
  const device = new RecordingDevice(OFFERED);
  const state = driver.move(device);
  return { device, state };
}

describe('a transport that is saved and restored', () => {
  for (const eventIndex of [true, false]) {
    test(`goes on in its rings, past their end too; event index: ${eventIndex}`, () => {
      const features = eventIndex ? ~0n : ~feature(abi.VIRTIO_RING_F_EVENT_IDX);
      const { driver, queues } = ready({ features, queueSizes: [8, 4, 2] });
      for (let n = 0; n < 100; n++) {
        const queue = queues[n % 3] as MockQueue;
        queue.usedEvent = queue.usedIndex;
        expect(queue.request([Uint8Array.of(n), 4]).head).toBeLessThan(8);
        if (n % 2) expect(driver.acknowledge()).toBe(abi.VIRTIO_MMIO_INT_VRING);
        if (n % 7 === 0) moved(driver);
      }
      expect(driver.broken).toEqual([]);
      expect(queues.map(({ usedIndex }) => usedIndex)).toEqual([34, 33, 33]);
    });
  }

  test('tells its device what was negotiated, then serves what the guest has made available and not notified', () => {
    const { driver, queues } = ready({ features: feature(3) });
    queues[1].add([4]);
    const { device } = moved(driver);
    expect(device.calls).toEqual(['activate', 'queue 0', 'queue 1', 'queue 2']);
    expect(device.context.features).toBe(feature(3));
    expect(queues[1].completions()).toHaveLength(1);
    expect(driver.status & (DRIVER_OK | NEEDS_RESET)).toBe(DRIVER_OK);
  });

  test('raises its line again, which stays up until the guest acknowledges', () => {
    const { driver, queues } = ready();
    queues[0].request([4]);
    expect(driver.level).toBe(true);
    moved(driver);
    expect([driver.level, driver.read32(abi.VIRTIO_MMIO_INTERRUPT_STATUS)]).toEqual([true, 1]);
    driver.acknowledge();
    expect(driver.level).toBe(false);
    moved(driver);
    expect(driver.level).toBe(false);
  });

  test('lets a driver go on in the middle of its initialization', () => {
    const driver = new MockDriver(new RecordingDevice(OFFERED));
    let moves = 0;
    const write = driver.write32.bind(driver);
    driver.write32 = (register, value) => {
      write(register, value);
      moved(driver);
      moves++;
    };
    driver.initialize();
    expect(moves).toBeGreaterThan(30);
    expect(driver.queues[2]?.request([Uint8Array.of(1), 2]).head).toBe(0);
    expect((driver.device as RecordingDevice).context.features).toBe(feature(3));
  });

  test('of a driver that broke its ring waits for the reset as before', () => {
    const { driver, queues } = ready();
    queues[0].makeAvailable(99);
    queues[0].notify();
    expect(driver.status & NEEDS_RESET).not.toBe(0);
    const { device } = moved(driver);
    expect([driver.status & NEEDS_RESET, device.calls, driver.level]).toEqual([NEEDS_RESET, [], true]);
    queues[1].send([4]);
    expect(queues[1].completions()).toEqual([]);
    driver.initialize();
    expect(driver.queues[1]?.request([4]).head).toBe(0);
  });

  test('leaves alone a queue that its driver has taken back, or never set up', () => {
    const { driver, queues } = ready();
    driver.write32(abi.VIRTIO_MMIO_QUEUE_SEL, 1);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 0);
    const { device } = moved(driver);
    queues[1].send([4]);
    expect(queues[1].completions()).toEqual([]);
    expect(device.context.queues.map(({ alive }) => alive)).toEqual([true, false, true]);
    expect(driver.read32(abi.VIRTIO_MMIO_QUEUE_READY)).toBe(0);
  });

  test('keeps what its device saves, which may still use its queues for that', () => {
    const { device, driver, queues } = ready();
    device.onQueue = () => {};
    queues[0].send([4]);
    const chains = device.take(0);
    Object.assign(device, {
      save: () => {
        const queue = device.context.queues[0];
        for (const chain of chains.splice(0)) queue?.push(chain, 3);
        queue?.publish();
        return { counted: 7 };
      },
    });
    expect(driver.transport.save()).toMatchObject({
      device: { counted: 7 },
      interruptStatus: 1,
      queues: [{ nextUsed: 1 }, {}, {}],
    });
    const other = Object.assign(new RecordingDevice(OFFERED), {
      restore: (state: StateReader) => void other.calls.push(`restore ${state.number('counted', 0, 9)}`),
    });
    driver.move(other);
    expect(other.calls.slice(0, 3)).toEqual(['activate', 'restore 7', 'queue 0']);
  });
});

describe('a state that cannot be', () => {
  const fresh = (driver: MockDriver, options = OFFERED) => {
    const host = { memory: driver.memory, interrupt: { set: () => {} }, broken: () => {} };
    return new VirtioMmio(new RecordingDevice(options), host);
  };
  const good = () => {
    const { driver, queues } = ready();
    queues[0].request([4]);
    return { driver, state: JSON.parse(JSON.stringify(driver.transport.save())) };
  };

  test('is refused by the field that is missing or of another kind', () => {
    const { driver, state } = good();
    expectDamageIsRefused(state, () => fresh(driver));
  });

  type Change = (state: { -readonly [K in keyof TransportState]: TransportState[K] }) => void;
  const queue = (fields: object): Change => {
    return (state) => {
      state.queues = state.queues.map((one, index) => (index === 1 ? { ...one, ...fields } : one));
    };
  };
  test.each<[string, RegExp, Change]>([
    ['a status bit that there is not', /status is 31/, (state) => (state.status |= 16)],
    ['a driver that is ready without features', /status is 7/, (state) => (state.status &= ~8)],
    ['a feature that is not offered', /driverFeatures/, (state) => (state.driverFeatures = (1n << 60n).toString(16))],
    ['too many features', /driverFeatures/, (state) => (state.driverFeatures = 'f'.repeat(33))],
    ['an interrupt that there is not', /interruptStatus/, (state) => (state.interruptStatus = 4)],
    [
      'an interrupt without a driver',
      /interruptStatus/,
      (state) => {
        state.status = 0;
        state.interruptStatus = 1;
      },
    ],
    ['a queue too many', /queues/, (state) => (state.queues = [...state.queues, ...state.queues])],
    ['a queue too few', /queues has 2 elements, not 3/, (state) => (state.queues = state.queues.slice(1))],
    ['a queue larger than it may be', /queues\[1\].ready cannot be: it is a queue of 16/, queue({ size: 16 })],
    ['a queue of no power of two', /queues\[1\].ready/, queue({ size: 3 })],
    [
      'a table outside RAM',
      /queues\[1\].ready cannot be: it is a descriptor table outside RAM/,
      queue({ descriptors: 2 ** 40 }),
    ],
    ['a ring at the end of RAM', /available ring outside RAM/, queue({ available: (8 << 20) - 2 })],
    ['a used ring past 2^53', /used ring outside RAM/, queue({ used: 2 ** 63 })],
    ['a ring that is misaligned', /misaligned/, queue({ used: 0x1001 })],
    ['a position past 16 bits', /queues\[1\].nextAvailable/, queue({ nextAvailable: 0x1_0000 })],
    [
      'more chains than the queue has',
      /queues\[1\].nextUsed leaves 9 chains in a queue of 8/,
      queue({ nextAvailable: 9 }),
    ],
    ['chains used that never came', /queues\[1\].nextUsed leaves 65535 chains/, queue({ nextUsed: 1 })],
  ])('%s', (_, message, change) => {
    const { driver, state } = good();
    change(state);
    const act = () => fresh(driver).restore(new StateReader(state, 'devices.mmio.test'));
    expect(act).toThrow(message);
    expect(act).toThrow(expect.objectContaining({ code: 'ERR_SNAPSHOT' }));
  });

  test('a queue that another kind of device does not have', () => {
    const { driver, state } = good();
    const other = fresh(driver, { ...OFFERED, queueSizes: [8, 4, 8] });
    expect(() => other.restore(new StateReader(state, 'devices.mmio.test'))).toThrow(/queues\[1\].ready/);
  });
});
