import { describe, expect, test } from 'vitest';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { ConsoleRig, NO_MULTIPORT } from './rig.js';

const { virtio_console_config: layout } = abi;
const CONFIG_CHANGED = abi.VIRTIO_MMIO_INT_CONFIG;

describe('5.3.2 Virtqueues', () => {
  test('port 0, then control, then a pair for each further port', () => {
    using rig = ConsoleRig.open('hvc0', 'a', 'b');
    expect(rig.driver.queues).toHaveLength(8);
    for (const [id, index] of [1, 5, 7].entries()) {
      rig.driver.queues[index]?.request([Buffer.from(`to ${id}`)]);
      expect(rig.host(id).read().toString()).toBe(`to ${id}`);
    }
    for (const [id, index] of [0, 4, 6].entries()) {
      const queue = rig.driver.queues[index];
      queue?.send([16]);
      rig.host(id).write(`from ${id}`);
      rig.pump();
      const [done] = queue?.completions() ?? [];
      expect(Buffer.from(done?.data.subarray(0, done.written) ?? []).toString()).toBe(`from ${id}`);
    }
  });

  test('port 0 alone exists where MULTIPORT is not negotiated', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a'], { features: NO_MULTIPORT });
    rig.transmitq(0).request([Buffer.from('console')]);
    expect(rig.host(0).read().toString()).toBe('console');
    rig.transmitq(1).send([Buffer.from('nothing')]);
    rig.driver.queues[3]?.send([new Uint8Array(8)]);
    expect(rig.transmitq(1).completions()).toEqual([]);
    expect(rig.driver.queues[3]?.completions()).toEqual([]);
    expect(rig.host(1).read()).toHaveLength(0);
  });

  test('a driver may make its queues smaller', () => {
    using rig = ConsoleRig.ready(['hvc0'], { queueSizes: [1, 1] });
    for (const text of ['one', 'two', 'three']) rig.transmitq(0).request([Buffer.from(text)]);
    expect(rig.host(0).read().toString()).toBe('onetwothree');
  });
});

describe('5.3.3 Feature bits', () => {
  const bits = {
    size: feature(abi.VIRTIO_CONSOLE_F_SIZE),
    multiport: feature(abi.VIRTIO_CONSOLE_F_MULTIPORT),
    emergency: feature(abi.VIRTIO_CONSOLE_F_EMERG_WRITE),
  };
  for (const [ports, multiport] of [
    [['hvc0'], false],
    [['agent'], true],
    [['hvc0', 'agent'], true],
    [['hvc0', 'hvc1'], true],
  ] as const) {
    test(`of ${ports.join(' and ')}: ${multiport ? 'with' : 'without'} MULTIPORT`, () => {
      using rig = new ConsoleRig(...ports);
      expect(rig.device.features).toBe(bits.size | bits.emergency | (multiport ? bits.multiport : 0n));
      expect(rig.device.queueSizes).toHaveLength(multiport ? 2 * ports.length + 2 : 2);
    });
  }
});

describe('5.3.4 Device configuration layout', () => {
  test('columns, rows and the number of ports', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a', 'b']);
    rig.streams[0]?.resize({ rows: 0x0102, columns: 0x0304 });
    expect([...rig.driver.readConfig(0, 12)]).toEqual([4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0]);
    expect([...rig.driver.readConfig(layout.rows, 2)]).toEqual([2, 1]);
    expect([...rig.driver.readConfig(layout.max_nr_ports, 4)]).toEqual([3, 0, 0, 0]);
  });

  test('the size of port 0 counts, and is 0 by 0 while nobody has said', () => {
    using rig = ConsoleRig.ready(['hvc0', 'hvc1']);
    rig.streams[1]?.resize({ rows: 50, columns: 132 });
    expect([...rig.driver.readConfig(0, 4)]).toEqual([0, 0, 0, 0]);
  });

  test('bytes past the end are left alone', () => {
    using rig = ConsoleRig.ready(['hvc0']);
    expect([...rig.driver.readConfig(10, 4)]).toEqual([0, 0, 0xff, 0xff]);
    for (const offset of [12, 13, 4096 - 0x100 - 4]) {
      expect([...rig.driver.readConfig(offset, 4)]).toEqual([0xff, 0xff, 0xff, 0xff]);
    }
  });

  test('only emerg_wr does something when written', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    const before = rig.driver.readConfig(0, 12);
    for (const offset of [0, 1, 2, 4, 6, 7, 9, 10, 11, 12, 100]) {
      for (const length of [1, 2, 4, 8]) rig.driver.writeConfig(offset, new Uint8Array(length).fill(0x41));
    }
    expect(rig.driver.readConfig(0, 12)).toEqual(before);
    expect(rig.host(0).read()).toHaveLength(0);
  });
});

describe('5.3.5.1 Device Initialization: the device MUST allow a write to emerg_wr, even on an unconfigured device', () => {
  const emergency = (rig: ConsoleRig, text: string) => {
    for (const character of text) {
      // SHOULD transmit the lower byte written.
      rig.driver.writeConfig(layout.emerg_wr, Uint8Array.of(character.charCodeAt(0), 0x42, 0x43, 0x44));
    }
  };

  test('before any driver', () => {
    using rig = new ConsoleRig('hvc0', 'a');
    emergency(rig, 'early');
    expect(rig.host(0).read().toString()).toBe('early');
    expect(rig.host(1).read()).toHaveLength(0);
  });

  test('with a driver, in the order of its other output, and by a byte alone', () => {
    using rig = ConsoleRig.ready(['hvc0'], { features: 0n });
    rig.transmitq(0).request([Buffer.from('before ')]);
    emergency(rig, 'now');
    rig.driver.writeConfig(layout.emerg_wr, Uint8Array.of(0x21));
    rig.transmitq(0).request([Buffer.from(' after')]);
    expect(rig.host(0).read().toString()).toBe('before now! after');
  });

  test('after a ring was broken', () => {
    using rig = ConsoleRig.ready(['hvc0']);
    rig.transmitq(0).makeAvailable(0xffff);
    rig.transmitq(0).notify();
    expect(rig.driver.broken).toHaveLength(1);
    emergency(rig, 'panic');
    expect(rig.host(0).read().toString()).toBe('panic');
  });

  test('what nobody reads is lost, and what was written before is not', () => {
    using rig = new ConsoleRig('hvc0');
    for (let i = 0; i < 50_000; i++) rig.driver.writeConfig(layout.emerg_wr, Uint8Array.of(i, 0, 0, 0));
    const seen = rig.host(0).read();
    expect(seen.length).toBeGreaterThan(100);
    expect(seen.length).toBeLessThan(50_000);
    expect(seen).toEqual(Buffer.from(Uint8Array.from({ length: seen.length }, (_, i) => i)));
    rig.host(0).close();
    emergency(rig, 'gone');
  });
});

describe('5.3.6 Device Operation: a configuration change tells of the size', () => {
  test('where MULTIPORT is not negotiated', () => {
    for (const [ports, features] of [
      [['hvc0'], ~0n],
      [['hvc0', 'a'], NO_MULTIPORT],
    ] as const) {
      using rig = ConsoleRig.ready(ports, { features });
      const generation = rig.driver.read32(abi.VIRTIO_MMIO_CONFIG_GENERATION);
      rig.streams[0]?.resize({ rows: 24, columns: 80 });
      expect(rig.driver.acknowledge()).toBe(CONFIG_CHANGED);
      expect(rig.driver.read32(abi.VIRTIO_MMIO_CONFIG_GENERATION)).not.toBe(generation);
      expect([...rig.driver.readConfig(0, 4)]).toEqual([80, 0, 24, 0]);
    }
  });

  test('a size from before the driver is told once the guest has printed', () => {
    using rig = new ConsoleRig('hvc0');
    rig.streams[0]?.resize({ rows: 24, columns: 80 });
    for (let boot = 0; boot < 2; boot++) {
      rig.reinitialize();
      expect(rig.driver.acknowledge()).toBe(0);
      rig.transmitq(0).request([Buffer.from('#')]);
      expect(rig.driver.acknowledge() & CONFIG_CHANGED).toBe(CONFIG_CHANGED);
      rig.transmitq(0).request([Buffer.from('#')]);
      expect(rig.driver.acknowledge() & CONFIG_CHANGED).toBe(0);
    }
  });

  test('not where it is by control messages, nor of another port, nor without SIZE', () => {
    using multiport = ConsoleRig.open('hvc0', 'hvc1');
    multiport.driver.acknowledge();
    multiport.streams[0]?.resize({ rows: 24, columns: 80 });
    multiport.transmitq(0).request([Buffer.from('#')]);
    expect(multiport.driver.acknowledge() & CONFIG_CHANGED).toBe(0);

    using single = ConsoleRig.ready(['hvc0', 'hvc1'], { features: NO_MULTIPORT });
    single.streams[1]?.resize({ rows: 24, columns: 80 });
    expect(single.driver.acknowledge()).toBe(0);

    using sizeless = ConsoleRig.ready(['hvc0'], { features: 0n });
    sizeless.streams[0]?.resize({ rows: 24, columns: 80 });
    sizeless.transmitq(0).request([Buffer.from('#')]);
    expect(sizeless.driver.acknowledge() & CONFIG_CHANGED).toBe(0);
  });

  test('nor to a driver that is not there', () => {
    using rig = new ConsoleRig('hvc0');
    rig.streams[0]?.resize({ rows: 24, columns: 80 });
    expect(rig.driver.level).toBe(false);
  });
});
