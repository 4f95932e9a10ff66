import { setTimeout as delay } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { DeviceHandles } from '#dist/machine/device-handle.js';

function rig() {
  const sent: unknown[] = [];
  const handles = new DeviceHandles([{ name: 'a' }, { name: 'b' }], (request) => sent.push(request));
  const message = (value: unknown) => handles.receive({ type: 'device-message', device: 1, value });
  return { handles, handle: handles.get('b'), sent, message };
}

test('a device is had by its name, and knows where the guest finds it', () => {
  const { handles, handle } = rig();
  handles.place([
    { base: 1, length: 2, gsi: 3 },
    { base: 0xd100_0000, length: 16, gsi: undefined },
  ]);
  expect([handle.name, handle.address, handle.interrupt]).toEqual(['b', 0xd100_0000, undefined]);
  expect(() => handles.get('c')).toThrow(/no device 'c'; this machine has a, b/);
  expect(() => new DeviceHandles([], () => {}).get('c')).toThrow(/has none/);
});

test('what is sent goes to its device; after the end nowhere', () => {
  const { handles, handle, sent } = rig();
  handle.postMessage({ x: 1 });
  handles.close();
  handle.postMessage({ x: 2 });
  expect(sent).toEqual([{ device: 1, value: { x: 1 } }]);
});

test('messages wait for the first listener', async () => {
  const { handle, message } = rig();
  message(1);
  message(2);
  const got: unknown[] = [];
  handle.on('message', (value) => got.push(value));
  message(3);
  await delay(0);
  expect(got).toEqual([1, 2, 3]);
  handle.removeAllListeners('message');
  message(4);
  handle.once('message', (value) => got.push(`once ${value}`));
  await delay(0);
  message(5);
  expect(got).toEqual([1, 2, 3, 'once 4']);
});

test('messages come one at a time to who iterates, until the machine ends', async () => {
  const { handles, handle, message } = rig();
  message(1);
  const got: unknown[] = [];
  const done = (async () => {
    for await (const value of handle) got.push(value);
  })();
  await delay(0);
  message(2);
  message(undefined);
  await delay(0);
  expect(got).toEqual([1, 2, undefined]);
  let closed = 0;
  handle.on('close', () => closed++);
  handles.close();
  handles.close();
  await done;
  expect(closed).toBe(1);
  for await (const value of handle) got.push(value);
  expect(got).toHaveLength(3);
});

test('what was taken is told in batches; what waits is not', async () => {
  const { handles, handle, message, sent } = rig();
  for (let n = 0; n < 600; n++) message(n);
  expect(sent).toEqual([]);
  handle.on('message', () => {});
  await delay(0);
  expect(sent).toEqual([
    { device: 1, taken: 256 },
    { device: 1, taken: 256 },
  ]);
  const failures: unknown[] = [];
  handle.on('failed', (error) => failures.push(error));
  for (let n = 0; n < 256 - 88; n++) handles.receive({ type: 'device-failed', device: 1, why: 'Error: x' });
  expect(sent).toHaveLength(3);
  expect(failures[0]).toMatchObject({ code: 'ERR_DEVICE', message: "device 'b' threw Error: x" });
});
