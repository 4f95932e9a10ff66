import { once } from 'node:events';
import { expect, test } from 'vitest';
import { FrameChannel, unversioned } from '#dist/migration/channel.js';
import { FRAME_LIMITS, FrameType, versioned } from '#dist/migration/frames.js';
import { duplexPair } from '../../support/duplex-pair.js';

function channels(timeout = 60_000) {
  const [a, b] = duplexPair();
  return { here: new FrameChannel(a, timeout), there: new FrameChannel(b, timeout), raw: b };
}

function header(type: number, length: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeUInt32LE(type, 0);
  bytes.writeUInt32LE(length, 4);
  return bytes;
}

test('frames arrive whole and in order, however they are cut', async () => {
  const { here, raw } = channels();
  const body = Buffer.from(Array.from({ length: 300 }, (_, i) => i & 255));
  const bytes = Buffer.concat([
    header(FrameType.pages, body.length),
    body,
    header(FrameType.round, 0),
    header(FrameType.commit, 0),
  ]);
  for (let at = 0; at < bytes.length; at += 7) raw.write(bytes.subarray(at, at + 7));
  expect(await here.next(FrameType.pages)).toEqual({ type: FrameType.pages, payload: body });
  expect((await here.next(FrameType.round)).payload).toHaveLength(0);
  expect((await here.next(FrameType.commit)).type).toBe(FrameType.commit);
});

test('what was sent before the end is read before it', async () => {
  const { here, there } = channels();
  await there.send(FrameType.pages, Buffer.alloc(100_000, 7));
  await there.sendNow(FrameType.round);
  there.end();
  await new Promise((resolve) => setTimeout(resolve, 50));
  expect((await here.next(FrameType.pages)).payload).toHaveLength(100_000);
  await here.next(FrameType.round);
  await expect(here.next(FrameType.round)).rejects.toThrow('the connection was lost');
});

test.each(Object.entries(FRAME_LIMITS).map(([type, limit]) => [Number(type), limit]))(
  'a frame of type %i may have %i bytes and no more',
  async (type, limit) => {
    const { here, raw } = channels();
    raw.write(header(type, limit + 1));
    await expect(here.next(type as FrameType)).rejects.toThrow(
      `the other side sent a frame of type ${type} and ${limit + 1} bytes`,
    );
  },
);

test.each([0, 12, 2 ** 32 - 1])('a frame of type %i is refused', async (type) => {
  const { here, raw } = channels();
  raw.write(header(type, 0));
  await expect(here.next(FrameType.hello)).rejects.toThrow(`the other side sent a frame of type ${type}`);
});

test('a frame that does not belong there is refused', async () => {
  const { here, there } = channels();
  await there.send(FrameType.commit);
  await expect(here.next(FrameType.pages, FrameType.round)).rejects.toThrow('which does not belong there');
});

test('whoever sends without being asked for it has to wait', async () => {
  const { here, raw } = channels();
  const frame = Buffer.concat([header(FrameType.pages, 1 << 20), Buffer.alloc(1 << 20)]);
  let written = 0;
  for (; written < 64 && raw.write(frame); written++);
  await Promise.race([once(raw, 'drain'), new Promise((resolve) => setTimeout(resolve, 200))]);
  for (; written < 64 && raw.write(frame); written++);
  expect(raw.writableNeedDrain).toBe(true);
  await here.next(FrameType.pages);
});

test('a refusal is told in one line without control characters', async () => {
  const { here, there } = channels();
  await there.refuse(`no\n\x1b[2J room ${'x'.repeat(2000)}`);
  await expect(here.next(FrameType.running)).rejects.toThrow(/^no \[2J room x{1,500}$/);
});

test('silence is a lost connection, for who waits for a frame and for who waits for room', async () => {
  const { here, there } = channels(100);
  await expect(here.next(FrameType.round)).rejects.toThrow('the other side has not answered for 100 ms');
  const send = async () => {
    for (let i = 0; i < 64; i++) await there.send(FrameType.pages, Buffer.alloc(1 << 20));
  };
  await expect(send()).rejects.toThrow('the other side has not answered for 100 ms');
});

test('who destroys it says why', async () => {
  const { here } = channels();
  const waits = here.next(FrameType.round);
  here.destroy(new Error('enough'));
  await expect(waits).rejects.toThrow('enough');
  await expect(here.send(FrameType.round)).rejects.toThrow('enough');
});

test('another version is told of', () => {
  expect(unversioned(versioned(Buffer.from('x'))).toString()).toBe('x');
  expect(() => unversioned(Buffer.from([9, 0, 0, 0]))).toThrow('the other side speaks version 9 of the protocol');
  expect(() => unversioned(Buffer.from([1]))).toThrow('a greeting without a version');
});
