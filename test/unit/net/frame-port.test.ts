import { once } from 'node:events';
import { PassThrough, type Writable } from 'node:stream';
import { describe, expect, test } from 'vitest';
import { FramePort } from '#dist/backends/frame-port.js';
import { LENGTH_SIZE, NET_HEADER_SIZE, putFrameLength } from '#dist/backends/frame-stream-format.js';
import { duplexPair } from '../../support/duplex-pair.js';

const frame = (length: number, fill: number) => new Uint8Array(length).fill(fill);

/** As the device sends it. */
function message(frame: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(LENGTH_SIZE + NET_HEADER_SIZE + frame.length);
  putFrameLength(bytes, 0, bytes.length - LENGTH_SIZE);
  bytes.set(frame, LENGTH_SIZE + NET_HEADER_SIZE);
  return bytes;
}

describe('a network card’s frames as a stream', () => {
  test('come whole, whatever the chunks are, and are not what is too short for one', async () => {
    const [link, device] = duplexPair();
    const port = new FramePort(link);
    const bytes = Buffer.concat([message(frame(60, 1)), message(frame(13, 2)), message(frame(1514, 3))]);
    for (const byte of bytes) device.write(Buffer.of(byte));
    const frames = port[Symbol.asyncIterator]();
    expect((await frames.next()).value).toEqual(frame(60, 1));
    expect((await frames.next()).value).toEqual(frame(1514, 3));
    device.destroy();
    expect(await frames.next()).toEqual({ done: true, value: undefined });
  });

  test('go out one a message, complete', async () => {
    const [link, device] = duplexPair();
    const port = new FramePort(link);
    port.write(frame(60, 7));
    const expected = Buffer.from(message(frame(60, 7)));
    expected[LENGTH_SIZE + 10] = 1; // num_buffers
    const [first] = await once(device, 'readable').then(() => [device.read()]);
    expect(first).toEqual(expected);
  });

  test.each([
    ['text', 'hello'],
    ['too short', frame(13, 0)],
    ['too long', frame(65_551, 0)],
  ])('are not %s', async (_, bad) => {
    const [link] = duplexPair();
    const port = new FramePort(link);
    (port as Writable).write(bad);
    const [error] = await once(port, 'error');
    expect(error).toMatchObject({ code: 'ERR_USAGE' });
    expect(link.destroyed).toBe(true);
  });

  test('wait for a slow reader with its sender', async () => {
    const link = new PassThrough();
    const port = new FramePort(link);
    const piece = message(frame(1500, 1));
    let sent = 0;
    const send = () => {
      while (sent++ < 10_000) if (!link.write(piece)) return void link.once('drain', send);
    };
    send();
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(sent).toBeLessThan(1000);
    let read = 0;
    for await (const one of port) {
      expect(one.length).toBe(1500);
      if (++read === 5000) break;
    }
    expect(sent).toBeGreaterThanOrEqual(5000);
  });
});
