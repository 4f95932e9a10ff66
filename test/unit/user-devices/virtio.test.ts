import { describe, expect, test } from 'vitest';
import { type Chain, type Queue, VirtioDevice } from '#dist/device/index.js';
import { UserVirtio } from '#dist/machine/user-devices/virtio.js';
import { StateReader } from '#dist/state-reader.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { expectDamageIsRefused } from '../../support/damaged-state.js';
import { RecordingServices } from '../../support/devices/services.js';
import { MockDriver, mockMemory } from '../../support/virtio/mock-driver.js';

const NEEDS_RESET = abi.VIRTIO_CONFIG_S_NEEDS_RESET;

const CIRCLE: unknown[] = [];
CIRCLE.push(CIRCLE);

/** Does what its test says; by itself it echoes. */
class Echo extends VirtioDevice<{ greeting?: string } | undefined> {
  type = 42;
  queueSizes = [8, 4];
  override features = 1n << 5n;
  override config = Uint8Array.of(1, 2, 3);
  onQueue = echoAll as (queue: Queue, index: number) => void;
  onReset: (() => void) | undefined;
  received: unknown[] = [];
  drained = 0;

  handleQueue(index: number): unknown {
    const queue = this.queues[index] as Queue;
    return this.onQueue(queue, index);
  }

  override onMessage(value: unknown): void {
    if (value === 'throw') throw new Error('asked to');
    this.received.push(value);
  }

  override onDrain(): void {
    this.drained++;
  }

  override reset(): void {
    this.onReset?.();
  }
}

function echoAll(queue: Queue): void {
  for (let chain = queue.pop(); chain; chain = queue.pop()) queue.push(chain, echo(chain));
  queue.publish();
}

function echo(chain: Chain): number {
  const bytes = new Uint8Array(chain.readable.length);
  chain.readable.read(0, bytes);
  return chain.writable.write(0, bytes);
}

function rig() {
  const services = new RecordingServices();
  const host = new UserVirtio(3, 'echo', services);
  const device = new Echo({ name: 'echo', options: { greeting: 'hi' }, host });
  expect(UserVirtio.problem(device)).toBeUndefined();
  host.adopt(device);
  const { memory } = mockMemory();
  host.powerOn({ memory, setInterrupt: () => {} });
  const driver = new MockDriver(host, memory);
  return { services, host, device, driver, memory };
}

function ready() {
  const all = rig();
  all.driver.initialize();
  return all;
}

describe('a user’s virtio device', () => {
  test('gets requests and answers them; what it is and offers is told its driver', () => {
    const { device, driver, memory } = rig();
    expect([device.name, device.options, device.queues, device.accepted]).toEqual(['echo', { greeting: 'hi' }, [], 0n]);
    driver.initialize();
    expect(driver.read32(abi.VIRTIO_MMIO_DEVICE_ID)).toBe(42);
    expect([...driver.readConfig(1, 4)]).toEqual([2, 3, 0xff, 0xff]);
    expect(device.accepted).toBe(1n << 5n);
    expect(device.memory).toBe(memory);
    expect(device.queues.map(({ size }) => size)).toEqual([8, 4]);
    const { written, data } = driver.queues[1]?.request([Uint8Array.of(7, 8, 9), 2]) ?? {};
    expect([written, ...(data ?? [])]).toEqual([2, 7, 8]);
    const config = driver.read32(abi.VIRTIO_MMIO_CONFIG_GENERATION);
    device.configChanged();
    expect(driver.read32(abi.VIRTIO_MMIO_CONFIG_GENERATION)).toBe(config + 1);
  });

  test('may keep a chain and give it back later, in any order', () => {
    const { device, driver } = ready();
    const kept: Chain[] = [];
    device.onQueue = (queue) => {
      for (let chain = queue.pop(); chain; chain = queue.pop()) kept.push(chain);
    };
    const heads = [1, 2, 3].map((byte) => driver.queues[0]?.send([Uint8Array.of(byte), 1]));
    expect(driver.queues[0]?.completions()).toEqual([]);
    for (const chain of kept.reverse()) device.queues[0]?.push(chain, echo(chain));
    device.queues[0]?.publish();
    const done = driver.queues[0]?.completions() ?? [];
    expect(done.map(({ head }) => head)).toEqual(heads.reverse());
    expect(done.map(({ data }) => data[0])).toEqual([3, 2, 1]);
  });

  test('a chain kept over a reset is empty, and to give it back does nothing, to either queue', () => {
    for (const end of ['driver', 'broken ring', 'power']) {
      const { device, driver, host } = ready();
      let kept: Chain | undefined;
      device.onQueue = (queue) => {
        kept ??= queue.pop();
      };
      const queue = driver.queues[0];
      queue?.send([Uint8Array.of(1, 2, 3), 5]);
      const chain = kept as Chain;
      const old = device.queues[0] as Queue;
      expect([chain.readable.length, chain.writable.length, old.size]).toEqual([3, 5, 8]);
      if (end === 'driver') driver.initialize();
      else if (end === 'power') host.powerOff();
      else {
        queue?.makeAvailable(200); // no such descriptor
        queue?.notify();
        device.onQueue = (queue) => expect(queue.pop()).toBeUndefined();
        queue?.notify();
        old.pop();
        expect(driver.status & NEEDS_RESET).toBe(NEEDS_RESET);
      }
      expect([chain.readable.length, chain.writable.length, old.size]).toEqual([0, 0, 0]);
      expect(chain.writable.write(0, Uint8Array.of(9))).toBe(0);
      expect(chain.readable.read(0, new Uint8Array(1))).toBe(0);
      old.push(chain, 0);
      old.publish();
      device.queues[0]?.push(chain, 0);
      device.queues[0]?.publish();
      expect(old.pop()).toBeUndefined();
      expect(driver.queues[0]?.completions()).toEqual([]);
      if (end === 'driver') expect(driver.status & NEEDS_RESET).toBe(0);
    }
  });

  test('mistakes with chains throw, and nothing of them reaches the guest', () => {
    const { device, driver } = ready();
    const mistakes: unknown[] = [];
    const attempt = (action: () => void) => {
      try {
        action();
      } catch (error) {
        mistakes.push((error as Error).message);
      }
    };
    device.onQueue = (queue, index) => {
      const chain = queue.pop();
      if (!chain) return;
      attempt(() => queue.push(chain, 3));
      attempt(() => queue.push(chain, -1));
      attempt(() => queue.push(chain, Number.NaN));
      attempt(() => device.queues[1 - index]?.push(chain, 0));
      attempt(() => queue.push({ ...chain }, 0));
      attempt(() => chain.writable.write(-1, Uint8Array.of(1)));
      attempt(() => chain.readable.read(0.5, new Uint8Array(1)));
      queue.push(chain, 2);
      expect([chain.readable.length, chain.writable.length]).toEqual([0, 0]);
      attempt(() => queue.push(chain, 0));
      queue.publish();
    };
    expect(driver.queues[0]?.request([Uint8Array.of(1), 2])).toMatchObject({ written: 2 });
    expect(mistakes).toEqual([
      'push: 3 bytes written to a chain that has room for 2',
      'push: -1 bytes written to a chain that has room for 2',
      'push: NaN bytes written to a chain that has room for 2',
      'push: a chain of another queue',
      'push: not a chain of this queue',
      'offset -1 is not a whole number',
      'offset 0.5 is not a whole number',
      'push: the chain was given back already',
    ]);
  });

  test('one that throws stops until its driver resets it; the program is told', () => {
    const { device, driver, host, services } = ready();
    device.onQueue = () => {
      throw new TypeError('no\nsuch thing');
    };
    driver.queues[0]?.send([1]);
    expect(driver.status & NEEDS_RESET).toBe(NEEDS_RESET);
    expect(driver.broken).toHaveLength(1);
    expect(driver.broken[0]).toMatch(/^virtio echo: internal error: TypeError: no\nsuch thing/);
    expect(services.reports).toEqual([
      {
        type: 'device-failed',
        device: 3,
        why: expect.stringMatching(/^TypeError: no such thing \(at .*virtio\.test\.ts:\d+:\d+\)+$/),
      },
    ]);
    host.receive('to nobody');
    expect(device.received).toEqual([]);
    device.onQueue = echoAll;
    driver.initialize();
    host.receive('again');
    expect(device.received).toEqual(['again']);
    expect(driver.queues[0]?.request([Uint8Array.of(5), 1]).data[0]).toBe(5);
  });

  test('one that throws outside of its driver’s requests stops too', () => {
    for (const when of ['ready', 'before'] as const) {
      const { device, driver, host, services } = when === 'ready' ? ready() : rig();
      host.receive('throw');
      expect(services.reports).toHaveLength(1);
      if (when === 'ready') expect(driver.broken[0]).toMatch(/^virtio echo: Error: asked to/);
      else expect(services.lines[0]).toMatch(/^device echo: Error: asked to.*; it waits for a reset$/);
      host.receive('throw');
      host.receive(1);
      expect([services.reports.length, device.received]).toEqual([1, []]);
      driver.initialize();
      host.receive(2);
      expect(device.received).toEqual([2]);
    }
  });

  test('one whose handler is asynchronous stops: it would never go on', () => {
    const { device, driver, services } = ready();
    device.onQueue = async () => {};
    driver.queues[0]?.send([1]);
    expect(driver.status & NEEDS_RESET).toBe(NEEDS_RESET);
    expect(services.reports).toMatchObject([{ why: expect.stringMatching(/^TypeError: a method returned a promise/) }]);
  });

  test('one whose reset throws does not come back, whatever its driver does', () => {
    const { device, driver } = ready();
    device.onReset = () => {
      throw new Error('never again');
    };
    for (let n = 0; n < 2; n++) {
      driver.negotiate();
      driver.status |= abi.VIRTIO_CONFIG_S_DRIVER_OK;
      expect(driver.status & NEEDS_RESET).toBe(NEEDS_RESET);
    }
    device.onReset = undefined;
    driver.initialize();
    expect(driver.status & NEEDS_RESET).toBe(0);
  });

  test('a flood of messages is refused at 1024 that nobody took, and the device hears when there is room', () => {
    const { device, host, services } = ready();
    let posted = 0;
    while (device.channel.postMessage(posted)) posted++;
    expect(posted).toBe(1024);
    expect(services.reports).toHaveLength(1024);
    expect(device.channel.postMessage('more')).toBe(false);
    host.taken(256);
    expect(device.drained).toBe(1);
    host.taken(256);
    expect(device.drained).toBe(1);
    for (let n = 0; n < 512; n++) expect(device.channel.postMessage(n)).toBe(true);
    expect(device.channel.postMessage('more')).toBe(false);
  });

  test('failures count as messages: a guest that causes them for ever does not flood the program', () => {
    const { device, driver, services } = rig();
    device.onReset = () => {
      throw new Error('again');
    };
    for (let n = 0; n < 3000; n++) driver.status = 0;
    expect(services.reports).toHaveLength(1024);
  });

  test('a value that cannot be cloned is the device’s mistake, and counts for nothing', () => {
    const { device, services } = ready();
    expect(() => device.channel.postMessage(() => {})).toThrow(/could not be cloned/);
    expect(services.reports).toEqual([]);
  });

  test('its log is limited', () => {
    const { device, services } = ready();
    for (let n = 0; n < 200; n++) device.log('info', `line ${n}`);
    expect(services.lines).toHaveLength(60);
    expect(services.lines[0]).toBe('device echo: line 0');
  });

  test('has no memory while no machine is powered on', () => {
    const { device, host } = ready();
    host.powerOff();
    expect(() => device.memory).toThrow(/no guest memory while the machine is not powered on/);
    expect(device.queues).toEqual([]);
  });
});

describe('what a class must say of itself', () => {
  const problem = (fields: object) => UserVirtio.problem(Object.assign(rig().device, fields));
  for (const [fields, message] of [
    [{ type: 0 }, /^type: 0/],
    [{ type: undefined }, /^type: undefined/],
    [{ queueSizes: [] }, /^queueSizes: must have/],
    [{ queueSizes: undefined }, /^queueSizes: must have/],
    [{ queueSizes: [8, 12] }, /^queueSizes: 12 is not a power of two/],
    [{ queueSizes: [2 ** 16] }, /^queueSizes: 65536/],
    [{ features: 1 }, /^features: must be a bigint/],
    [{ features: 1n << 32n }, /^features: must be a bigint of the bits/],
    [{ config: [1] }, /^config: must be/],
    [{ config: new Uint8Array(3841) }, /^config: must be/],
    [{ handleQueue: 1 }, /^handleQueue/],
  ] as const) {
    test(JSON.stringify(fields, (_, value) => (typeof value === 'bigint' ? `${value}n` : value)).slice(0, 60), () => {
      expect(problem(fields)).toMatch(message);
    });
  }
});

/** Another rig's device in place of that which a driver has. */
function move(driver: MockDriver, prepare: (device: Echo) => void = () => {}) {
  const services = new RecordingServices();
  const host = new UserVirtio(3, 'echo', services);
  const device = new Echo({ name: 'echo', options: undefined, host });
  prepare(device);
  host.adopt(device);
  host.powerOn({ memory: driver.memory, setInterrupt: () => {} });
  const state = driver.move(host);
  return { host, device, services, state };
}

describe('a user’s virtio device that is saved and restored', () => {
  const keepAll = (kept: Chain[]) => (queue: Queue) => {
    for (let chain = queue.pop(); chain; chain = queue.pop()) kept.push(chain);
  };

  test('gets again the chains that it kept, in their order and before others, and may keep them once more', () => {
    const { device, driver } = ready();
    const kept: Chain[] = [];
    device.onQueue = keepAll(kept);
    for (const byte of [1, 2, 3, 4]) driver.queues[0]?.send([Uint8Array.of(byte), 1], { indirect: byte % 2 === 0 });
    device.queues[0]?.push(kept[1] as Chain, echo(kept[1] as Chain)); // shown by the saving of it
    driver.queues[0]?.add([Uint8Array.of(5), 1]);

    const again: Chain[] = [];
    const first = move(driver, (next) => {
      next.onQueue = keepAll(again);
    });
    expect(first.state.device).toEqual({ stopped: false, queues: [{ kept: [0, 3, 5] }, { kept: [] }] });
    const bytes = again.map(({ readable }) => byteOf(readable));
    expect(bytes).toEqual([1, 3, 4, 5]);
    expect(driver.queues[0]?.completions().map(({ data }) => data[0])).toEqual([2]);
    first.device.queues[0]?.push(again[3] as Chain, echo(again[3] as Chain));

    // One of them is popped of the next, the rest not yet when that is saved.
    const last: Chain[] = [];
    const second = move(driver, (next) => {
      next.onQueue = (queue) => {
        const chain = last.length === 0 && queue.pop();
        if (chain) last.push(chain);
      };
    });
    expect(last.map(({ readable }) => byteOf(readable))).toEqual([1]);
    const { state } = move(driver);
    expect(state.device).toMatchObject({ queues: [{ kept: [0, 3, 5] }, {}] });
    expect(second.host.queues[0]?.size).toBe(8);
    const done = driver.queues[0]?.completions() ?? [];
    expect(done.map(({ data }) => data[0])).toEqual([5, 1, 3, 4]);
    expect(driver.queues[0]?.request([Uint8Array.of(6), 1]).data[0]).toBe(6);
    expect(driver.broken).toEqual([]);
  });

  test('has its own state, given after its queues are there and before they are handled', () => {
    const { device, driver } = ready();
    const state = { list: [1, null, { text: 'ä', on: true }] };
    device.save = () => state;
    const calls: string[] = [];
    const { state: saved } = move(driver, (next) => {
      next.restore = (given) => void calls.push(`restore ${JSON.stringify(given)} with ${next.queues.length} queues`);
      next.onQueue = (_, index) => void calls.push(`queue ${index}`);
    });
    expect(calls).toEqual([`restore ${JSON.stringify(state)} with 2 queues`, 'queue 0', 'queue 1']);
    expect(saved.device).toMatchObject({ state });
  });

  test('without a driver, too', () => {
    const { device, driver } = rig();
    device.save = () => 'early';
    let given: unknown;
    move(driver, (next) => {
      next.restore = (state) => {
        given = [state, next.queues];
      };
    });
    expect(given).toEqual(['early', []]);
  });

  test.each<[string, unknown]>([
    ['a function', () => {}],
    ['a bigint', 1n],
    ['NaN', [Number.NaN]],
    ['a Map', { map: new Map() }],
    ['bytes', new Uint8Array(3)],
    ['a field without value', { field: undefined }],
    ['a date', new Date()],
    ['an object of a class', new (class {})()],
    ['a circle', CIRCLE],
    ['too much', 'x'.repeat(2 ** 20)],
  ])('cannot be saved with %s; it goes on', (_, value) => {
    const { device, driver } = ready();
    device.save = () => value;
    const message = expect.stringMatching(/^device 'echo': its save\(\) returned what cannot be saved; it may be/);
    expect(() => driver.transport.save()).toThrow(expect.objectContaining({ code: 'ERR_DEVICE', message }));
    expect(driver.queues[0]?.request([Uint8Array.of(6), 1]).data[0]).toBe(6);
  });

  test('whose save() or restore() throws, or is asynchronous, says so by name', () => {
    const { device, driver, services } = ready();
    device.save = () => {
      throw new RangeError('too far');
    };
    expect(() => driver.transport.save()).toThrow(/^device 'echo': its save\(\) threw RangeError: too far \(at /);
    device.save = async () => 1;
    expect(() => driver.transport.save()).toThrow(/its save\(\) threw TypeError: a method returned a promise/);
    expect(services.reports).toEqual([]);
    device.save = () => 1;
    const refuse = (restore: Echo['restore']) => () =>
      move(driver, (next) => {
        if (restore) next.restore = restore;
      });
    const thrower = refuse(() => {
      throw new TypeError('no number');
    });
    expect(thrower).toThrow(
      expect.objectContaining({ code: 'ERR_DEVICE', message: expect.stringContaining('no number') }),
    );
  });

  test('with a state, but no restore(), is refused', () => {
    const { device, driver } = ready();
    device.save = () => 1;
    expect(() => move(driver)).toThrow("device 'echo': it was saved with a state, but has no restore()");
  });

  test('that was stopped stays so until its driver resets it; it is not asked for its state', () => {
    const { device, driver } = ready();
    device.onQueue = () => {
      throw new Error('enough');
    };
    device.save = () => expect.unreachable();
    driver.queues[0]?.send([1]);
    expect(driver.status & NEEDS_RESET).toBe(NEEDS_RESET);
    const { device: next, state } = move(driver);
    expect(state.device).toEqual({ stopped: true, queues: [{ kept: [] }, { kept: [] }] });
    expect([...driver.readConfig(0, 1)]).toEqual([0xff]);
    driver.initialize();
    expect([...driver.readConfig(0, 1)]).toEqual([1]);
    expect(next.queues).toHaveLength(2);
  });

  test('a chain that its guest has broken meanwhile ends the queue as any broken one', () => {
    const { device, driver } = ready();
    device.onQueue = keepAll([]);
    driver.queues[0]?.send([Uint8Array.of(1), 1]);
    driver.queues[0]?.writeDescriptor(driver.queues[0].descriptors, 0, 2 ** 40, 1, 0, 0);
    move(driver);
    expect(driver.status & NEEDS_RESET).toBe(NEEDS_RESET);
    expect(driver.broken).toEqual([expect.stringContaining('a buffer outside RAM')]);
  });

  describe('a state that cannot be', () => {
    const good = () => {
      const { device, driver } = ready();
      device.onQueue = keepAll([]);
      for (const byte of [1, 2]) driver.queues[0]?.send([Uint8Array.of(byte), 1]);
      return driver;
    };
    const fresh = (driver: MockDriver) => {
      const host = new UserVirtio(3, 'echo', new RecordingServices());
      host.adopt(new Echo({ name: 'echo', options: undefined, host }));
      host.powerOn({ memory: driver.memory, setInterrupt: () => {} });
      return new MockDriver(host, driver.memory).transport;
    };

    test('is refused by the field that is missing or of another kind', () => {
      const driver = good();
      expectDamageIsRefused(driver.transport.save(), () => fresh(driver));
    });

    test.each([
      ['a head past the table', [0, 8]],
      ['a chain too few', [0]],
      ['a chain too many', [0, 2, 4]],
      ['more than there can be', Array(9).fill(0)],
    ])('%s', (_, kept) => {
      const driver = good();
      const state = driver.transport.save();
      const damaged = { ...state, device: { ...state.device, queues: [{ kept }, { kept: [] }] } };
      const act = () => fresh(driver).restore(new StateReader(damaged, 'state'));
      expect(act).toThrow(/^snapshot: state.device.queues\[0\].kept/);
    });
  });
});

function byteOf(buffers: Chain['readable']): number | undefined {
  const bytes = new Uint8Array(1);
  buffers.read(0, bytes);
  return bytes[0];
}
