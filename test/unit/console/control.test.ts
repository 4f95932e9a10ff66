import { describe, expect, test } from 'vitest';
import { StateReader } from '#dist/state-reader.js';
import { VirtioConsole } from '#dist/virtio/console/console.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { expectDamageIsRefused } from '../../support/damaged-state.js';
import { MockDriver } from '../../support/virtio/mock-driver.js';
import { ConsoleRig, encode, type Message } from './rig.js';

const {
  VIRTIO_CONSOLE_DEVICE_READY: DEVICE_READY,
  VIRTIO_CONSOLE_PORT_ADD: PORT_ADD,
  VIRTIO_CONSOLE_PORT_REMOVE: PORT_REMOVE,
  VIRTIO_CONSOLE_PORT_READY: PORT_READY,
  VIRTIO_CONSOLE_CONSOLE_PORT: CONSOLE_PORT,
  VIRTIO_CONSOLE_RESIZE: RESIZE,
  VIRTIO_CONSOLE_PORT_OPEN: PORT_OPEN,
  VIRTIO_CONSOLE_PORT_NAME: PORT_NAME,
} = abi;

const deviceReady = { id: 0xffffffff, event: DEVICE_READY, value: 1 };
const portReady = (id: number) => ({ id, event: PORT_READY, value: 1 });
const name = (id: number, text: string): Message => ({ id, event: PORT_NAME, value: 1, rest: Buffer.from(text) });
const opened = (id: number, value = 1): Message => ({ id, event: PORT_OPEN, value });
const size = (id: number, columns: number, rows: number): Message => {
  const rest = Buffer.alloc(4);
  rest.writeUInt16LE(columns, 0);
  rest.writeUInt16LE(rows, 2);
  return { id, event: RESIZE, value: 0, rest };
};

/** Bytes as an array: views of other memory are equal then. */
const plain = (messages: readonly Message[]) => messages.map((m) => (m.rest ? { ...m, rest: [...m.rest] } : m));

describe('5.3.6.2 Multiport Device Operation', () => {
  test('ports are announced when the driver is ready, and described when they are', () => {
    using rig = ConsoleRig.ready(['hvc0', 'agent']);
    expect(rig.control()).toEqual([]);
    rig.sendControl(deviceReady);
    expect(rig.control()).toEqual([
      { id: 0, event: PORT_ADD, value: 0 },
      { id: 1, event: PORT_ADD, value: 0 },
    ]);
    rig.sendControl(portReady(1));
    expect(plain(rig.control())).toEqual(plain([name(1, 'agent'), opened(1)]));
    rig.sendControl(portReady(0));
    const console = { id: 0, event: CONSOLE_PORT, value: 1 };
    expect(plain(rig.control())).toEqual(plain([console, name(0, 'hvc0'), opened(0)]));
    expect(rig.device.malformed).toBe(0);
  });

  test('a console whose size is known: columns, then rows, after it is a console', () => {
    using rig = ConsoleRig.ready(['hvc0', 'hvc1']);
    rig.streams[1]?.resize({ rows: 43, columns: 300 });
    rig.sendControl(deviceReady);
    rig.control();
    rig.sendControl(portReady(1));
    const console = { id: 1, event: CONSOLE_PORT, value: 1 };
    expect(plain(rig.control())).toEqual(plain([console, size(1, 300, 43), name(1, 'hvc1'), opened(1)]));
  });

  test('RESIZE follows the host’s terminal; the last size is told where the guest is slow', () => {
    using rig = ConsoleRig.open('hvc0', 'hvc1');
    rig.streams[1]?.resize({ rows: 10, columns: 20 });
    expect(plain(rig.control())).toEqual(plain([size(1, 20, 10)]));
    // control() has left one buffer.
    for (let rows = 1; rows <= 100; rows++) rig.streams[0]?.resize({ rows, columns: 80 });
    expect(plain(rig.control())).toEqual(plain([size(0, 80, 1), size(0, 80, 100)]));
  });

  test('RESIZE is not sent of a port that is not ready, nor of a plain one', () => {
    using rig = ConsoleRig.ready(['hvc0', 'agent']);
    rig.streams[0]?.resize({ rows: 24, columns: 80 });
    rig.sendControl(deviceReady);
    expect(rig.control().map(({ event }) => event)).toEqual([PORT_ADD, PORT_ADD]);
    rig.streams[0]?.resize({ rows: 25, columns: 80 });
    rig.sendControl(portReady(1));
    rig.streams[1]?.resize({ rows: 25, columns: 80 });
    expect(rig.control().map(({ event }) => event)).toEqual([PORT_NAME, PORT_OPEN]);
  });

  test('DEVICE_READY with 0 is a failure: nothing follows', () => {
    using rig = ConsoleRig.ready(['hvc0', 'agent']);
    rig.sendControl({ ...deviceReady, value: 0 });
    expect(rig.control()).toEqual([]);
  });

  test('PORT_READY with 0 is a failure: that port is not described, the others are', () => {
    using rig = ConsoleRig.ready(['hvc0', 'agent']);
    rig.sendControl(deviceReady);
    rig.control();
    rig.sendControl({ id: 0, event: PORT_READY, value: 0 });
    rig.sendControl(portReady(1));
    expect(rig.control().map(({ id }) => id)).toEqual([1, 1]);
  });

  test('messages wait for buffers, in their order, and no longer than the reset', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a', 'b', 'c']);
    rig.sendControl(deviceReady);
    rig.sendControl(portReady(0));
    rig.sendControl(portReady(3));
    const events = rig.control().map(({ id, event }) => [id, event]);
    expect(events).toEqual([
      ...[0, 0, 0, 0].map((id, i) => [id, [PORT_ADD, CONSOLE_PORT, PORT_NAME, PORT_OPEN][i]]),
      [1, PORT_ADD],
      [2, PORT_ADD],
      ...[3, 3, 3].map((id, i) => [id, [PORT_ADD, PORT_NAME, PORT_OPEN][i]]),
    ]);

    rig.reinitialize();
    rig.sendControl(deviceReady);
    rig.reinitialize();
    expect(rig.control()).toEqual([]);
  });

  test('a message may come in pieces', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    const bytes = encode(deviceReady);
    rig.driver.queues[3]?.request([bytes.subarray(0, 1), bytes.subarray(1, 5), bytes.subarray(5)], { indirect: true });
    const receive = rig.driver.queues[2];
    receive?.send([3, 3, 1, 1]);
    expect(receive?.completions().map(({ data, written }) => [[...data], written])).toEqual([
      [[0, 0, 0, 0, PORT_ADD, 0, 0, 0], 8],
    ]);
  });
});

describe('5.3.6.2.1 the device MUST NOT specify a port which exists in PORT_ADD, nor one from max_nr_ports on', () => {
  test('however often the driver says that it or a port is ready', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    for (let i = 0; i < 5; i++) rig.sendControl(deviceReady);
    for (let i = 0; i < 5; i++) rig.sendControl(portReady(1));
    const messages = rig.control();
    rig.sendControl(deviceReady);
    rig.sendControl(portReady(1));
    expect(rig.control()).toEqual([]);
    expect(messages.filter(({ event }) => event === PORT_ADD).map(({ id }) => id)).toEqual([0, 1]);
    expect(messages.filter(({ event }) => event === PORT_NAME)).toHaveLength(1);
    expect(messages.filter(({ event }) => event === PORT_REMOVE)).toEqual([]);
  });

  test('after a reset they are new', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.reinitialize();
    rig.sendControl(deviceReady);
    expect(rig.control().map(({ id, event }) => [id, event])).toEqual([
      [0, PORT_ADD],
      [1, PORT_ADD],
    ]);
  });
});

describe('PORT_OPEN of the host’s end', () => {
  test('a plain port whose other side is closed is closed to the guest, once, after all it said', async () => {
    using rig = ConsoleRig.open('hvc0', 'agent');
    rig.host(1).write('last words');
    rig.host(1).close();
    await rig.settle();
    expect(rig.control()).toEqual([]); // the words are still to be read
    rig.receiveq(1).add([4]);
    rig.receiveq(1).send([100]);
    rig.receiveq(1).send([100]);
    const read = rig.receiveq(1).completions();
    expect(read.map(({ data, written }) => Buffer.from(data.subarray(0, written)).toString())).toEqual([
      'last',
      ' words',
    ]);
    await rig.settle();
    expect(rig.control()).toEqual([opened(1, 0)]);
    rig.receiveq(1).notify();
    rig.transmitq(1).request([Buffer.from('nobody hears')]);
    await rig.settle();
    expect(rig.control()).toEqual([]);
  });

  test('it is noticed while nothing is read or written', async () => {
    using rig = ConsoleRig.open('hvc0', 'agent');
    rig.receiveq(1).send([100]);
    rig.host(1).close();
    await rig.settle();
    expect(rig.control()).toEqual([opened(1, 0)]);
    const handled = rig.handled;
    await rig.settle();
    expect(rig.handled).toBe(handled); // and does not keep the thread busy
  });

  test('a console is not closed', async () => {
    using rig = ConsoleRig.open('hvc0', 'agent');
    rig.receiveq(0).send([100]);
    rig.host(0).close();
    await rig.settle();
    expect(rig.control()).toEqual([]);
  });

  test('a driver that comes later is told at once', async () => {
    using rig = ConsoleRig.open('hvc0', 'agent');
    rig.receiveq(1).send([100]);
    rig.host(1).close();
    await rig.settle();
    rig.reinitialize();
    rig.sendControl(deviceReady);
    rig.sendControl(portReady(1));
    expect(rig.control().at(-1)).toEqual(opened(1, 0));
  });
});

describe('a hostile driver', () => {
  const nonsense: [string, Uint8Array][] = [
    ['nothing', new Uint8Array()],
    ['a message of 7 bytes', encode(deviceReady).subarray(0, 7)],
    ['an unknown event', encode({ id: 0, event: 8, value: 1 })],
    ['the greatest event', encode({ id: 0, event: 0xffff, value: 1 })],
    ...[PORT_ADD, PORT_REMOVE, CONSOLE_PORT, RESIZE, PORT_NAME].map((event): [string, Uint8Array] => [
      `event ${event}, which is the device’s`,
      encode({ id: 0, event, value: 1 }),
    ]),
    ['a port that does not exist', encode(portReady(2))],
    ['the greatest port', encode({ id: 0xffffffff, event: PORT_OPEN, value: 1 })],
    ['an open that is neither 0 nor 1', encode({ id: 0, event: PORT_OPEN, value: 2 })],
    ['a ready that is neither 0 nor 1', encode({ id: 0, event: PORT_READY, value: 0xffff })],
  ];
  for (const [what, bytes] of nonsense) {
    test(`sends ${what}: it is counted, and no more`, () => {
      using rig = ConsoleRig.open('hvc0', 'a');
      const before = rig.device.save();
      rig.sendControl(bytes);
      expect(rig.device.malformed).toBe(1);
      expect(rig.device.save()).toEqual(before);
      expect(rig.control()).toEqual([]);
      expect(rig.driver.broken).toEqual([]);
    });
  }

  test('speaks of ports before they were announced', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    rig.sendControl(portReady(0));
    rig.sendControl(opened(1));
    expect(rig.device.malformed).toBe(2);
    expect(rig.control()).toEqual([]);
  });

  test('gives only writable memory to read a message from', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    rig.driver.queues[3]?.request([64]);
    expect(rig.device.malformed).toBe(1);
  });

  test('gives buffers that no message fits: they come back empty, and the message waits', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    rig.sendControl(deviceReady);
    const queue = rig.driver.queues[2];
    for (let i = 0; i < 50; i++) {
      queue?.send([7]);
      expect(queue?.completions().map(({ written }) => written)).toEqual([0]);
    }
    queue?.send([new Uint8Array(64)]); // nothing to write to at all
    expect(queue?.completions().map(({ written }) => written)).toEqual([0]);
    expect(rig.device.malformed).toBe(51);
    expect(rig.control().map(({ event }) => event)).toEqual([PORT_ADD, PORT_ADD]);
  });

  test('floods without taking messages: what waits is bounded', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a', 'b']);
    for (let i = 0; i < 3000; i++) {
      rig.sendControl(deviceReady);
      rig.sendControl(portReady(i % 3));
      rig.sendControl(opened(i % 3, i & 1));
      rig.streams[0]?.resize({ rows: 1 + (i % 60), columns: 80 });
    }
    expect(rig.control().length).toBeLessThanOrEqual(5 * 3);
    expect(rig.device.malformed).toBe(0);
  });

  test('breaks a ring: the device says so once and waits for a reset', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.driver.queues[3]?.makeAvailable(64);
    rig.driver.queues[3]?.notify();
    expect(rig.driver.broken).toHaveLength(1);
    expect(rig.driver.status & abi.VIRTIO_CONFIG_S_NEEDS_RESET).not.toBe(0);
    rig.streams[0]?.resize({ rows: 3, columns: 4 });
    rig.host(1).write('input');
    rig.pump();
    rig.reinitialize();
    rig.setUpPorts();
    rig.transmitq(1).request([Buffer.from('again')]);
    expect(rig.host(1).read().toString()).toBe('again');
  });
});

describe('saved and restored', () => {
  test('it goes on where the other stopped: what was to be told is told, closed ports stay closed', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.setOpen(0, false);
    rig.streams[0]?.resize({ rows: 24, columns: 80 });
    rig.control();
    rig.streams[0]?.resize({ rows: 25, columns: 81 });
    const { device } = rig.move();
    expect(rig.device.save()).toEqual(device);
    expect(plain(rig.control())).toEqual(plain([size(0, 81, 25)]));
    rig.receiveq(0).send([16]);
    rig.receiveq(1).send([16]);
    rig.host(0).write('closed');
    rig.host(1).write('open');
    rig.pump();
    expect(rig.receiveq(0).completions()).toEqual([]);
    expect(rig.receiveq(1).completions()).toHaveLength(1);
    expectDamageIsRefused(rig.driver.transport.save(), () => {
      return new MockDriver(new VirtioConsole({ ports: rig.streams, io: rig.io }), rig.driver.memory).transport;
    });
  });

  test('a console without control messages keeps its size, and hears of another', () => {
    using rig = ConsoleRig.ready(['hvc0']);
    rig.streams[0]?.resize({ rows: 24, columns: 80 });
    rig.driver.acknowledge();
    rig.move();
    expect([...rig.driver.readConfig(0, 4)]).toEqual([80, 0, 24, 0]);
    expect(rig.driver.level).toBe(false);
    rig.streams[0]?.resize({ rows: 50, columns: 100 });
    expect([...rig.driver.readConfig(0, 4)]).toEqual([100, 0, 50, 0]);
    expect(rig.driver.level).toBe(true);
    rig.host(0).write('typed');
    rig.receiveq(0).send([16]);
    rig.pump();
    expect(rig.receiveq(0).completions()).toMatchObject([{ written: 5 }]);
  });

  test('the guest hears that a port which was closed has a host again, and only then', async () => {
    using rig = ConsoleRig.open('a', 'b');
    rig.receiveq(0).send([16]);
    rig.host(0).close();
    await rig.until(() => rig.streams[0]?.closed === true);
    expect(plain(rig.control())).toEqual(plain([opened(0, 0)]));
    rig.move();
    expect(plain(rig.control())).toEqual(plain([opened(0)]));
    rig.move();
    expect(rig.control()).toEqual([]);
  });

  test('output that was taken in part goes on where it was', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const bytes = Buffer.alloc(4 << 20, 'abcdefghijklm');
    rig.transmitq(1).send([bytes]);
    const before = rig.host(1).read();
    expect(before.length).toBeLessThan(bytes.length);
    rig.move();
    const parts = [before];
    for (let n = 0; n < 100; n++) {
      rig.pump();
      parts.push(rig.host(1).read());
    }
    expect(Buffer.compare(Buffer.concat(parts), bytes)).toBe(0);
    expect(rig.transmitq(1).completions()).toHaveLength(1);
  });

  test('with another number of ports it is refused', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const { device } = rig.driver.transport.save();
    const other = new VirtioConsole({ ports: rig.streams.slice(0, 1), io: rig.io });
    expect(() => other.restore(new StateReader(device, 'console'))).toThrow(/console.control.ports is no list of/);
  });
});
