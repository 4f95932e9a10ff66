import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { VsockStream } from '#dist/index.js';
import { FakeGuest, input, LawfulEnd, type Ports } from './fake-guest.js';
import { Op, type Packet, pattern, Shutdown } from './packets.js';

/** Bytes that the host takes of one connection before anybody reads it. */
const HOST_BUFFER = 256 * 1024;
/** Bytes of data that wait for a device that does not read, besides what its socket holds. */
const LINK_FULL = 512 * 1024;

let guest: FakeGuest;
beforeEach(async () => {
  guest = await FakeGuest.make();
});
afterEach(() => guest[Symbol.asyncDispose]());

/** Makes ends that keep to the protocol, by the host's port. */
function lawful(): Map<string, LawfulEnd> {
  const ends = new Map<string, LawfulEnd>();
  guest.onPacket = (packet) => {
    const end = ends.get(`${packet.dstPort} ${packet.srcPort}`);
    if (!end) throw new Error(`a packet for port ${packet.dstPort}`);
    end.handle(packet);
  };
  return ends;
}

describe('data for the guest', () => {
  test('no more than the guest has credit for, asked for once', async () => {
    const { stream, ports } = await guest.connected(1000, { bufAlloc: 1000 });
    const data = pattern(3500);
    let written = false;
    stream.write(data, () => {
      written = true;
    });
    expect((await guest.next(Op.RW)).payload).toEqual(data.subarray(0, 1000));
    await guest.next(Op.CREDIT_REQUEST);
    guest.send({ ...ports, op: Op.CREDIT_UPDATE, bufAlloc: 1000, fwdCnt: 0 });
    expect(await guest.quiet()).toEqual([]);
    guest.send({ ...ports, op: Op.CREDIT_UPDATE, bufAlloc: 1000, fwdCnt: 400 });
    expect((await guest.next(Op.RW)).payload).toEqual(data.subarray(1000, 1400));
    await guest.next(Op.CREDIT_REQUEST);
    guest.send({ ...ports, op: Op.CREDIT_UPDATE, bufAlloc: 500, fwdCnt: 900 }); // the buffer shrinks: it is full
    expect(await guest.quiet()).toEqual([]);
    guest.send({ ...ports, op: Op.CREDIT_UPDATE, bufAlloc: 100, fwdCnt: 1000 }); // more than full
    expect(await guest.quiet()).toEqual([]);
    expect(written).toBe(false);
    guest.send({ ...ports, op: Op.CREDIT_UPDATE, bufAlloc: 0xffff_ffff, fwdCnt: 1400 });
    expect((await guest.next(Op.RW)).payload).toEqual(data.subarray(1400));
    await guest.until(() => written);
  });

  test('long writes are cut into packets of 64 KiB; short ones that waited go together', async () => {
    const { stream, ports } = await guest.connected(1000, { bufAlloc: 2 ** 31 });
    stream.write(pattern(150_000));
    for (const length of [65_536, 65_536, 150_000 - 2 * 65_536])
      expect(await guest.next(Op.RW)).toMatchObject({ len: length });
    guest.send({ ...ports, op: Op.CREDIT_UPDATE, bufAlloc: 0, fwdCnt: 150_000 });
    await guest.quiet();
    for (let i = 0; i < 100; i++) stream.write(Buffer.from([i]));
    stream.end();
    await guest.next(Op.CREDIT_REQUEST);
    guest.send({ ...ports, op: Op.CREDIT_UPDATE, bufAlloc: 1000, fwdCnt: 150_000 });
    await guest.next(Op.RW); // the first, which went alone
    expect((await guest.next(Op.RW)).payload).toEqual(Uint8Array.from({ length: 99 }, (_, i) => i + 1));
    await guest.next(Op.SHUTDOWN);
  });

  test('an empty write is no packet', async () => {
    const { stream } = await guest.connected();
    await new Promise((resolve) => stream.write('', resolve));
    stream.end();
    await guest.next(Op.SHUTDOWN);
  });

  test('a guest that reads slowly through a small buffer gets all of it', async () => {
    const ends = lawful();
    guest.onPacket = undefined;
    const { stream, ports } = await guest.connected(1000, { bufAlloc: 777 });
    const end = new LawfulEnd(guest, ports, undefined, 777);
    ends.set(`${ports.srcPort} ${ports.dstPort}`, end);
    guest.onPacket = (packet) => void (packet.op !== Op.SHUTDOWN && end.handle(packet));
    const data = pattern(200_000);
    stream.end(data);
    await once(stream, 'finish');
    await guest.until(() => end.bytes.length === data.length);
    expect(end.bytes.equals(data)).toBe(true);
  });

  test('a device that does not read: data waits with its writers, and nothing is lost', async () => {
    const streams: VsockStream[] = [];
    for (let port = 0; port < 20; port++) {
      streams.push((await guest.connected(port, { bufAlloc: 0x8000_0000 })).stream);
    }
    guest.socket.pause();
    const data = pattern(1 << 20);
    const finished = streams.map(async (stream) => {
      stream.end(data);
      await once(stream, 'finish');
    });
    await sleep(50);
    expect(guest.channel.writableLength).toBeLessThan(LINK_FULL);
    const got = new Map<number, Buffer[]>();
    guest.onPacket = ({ op, dstPort, payload }) => {
      if (op !== Op.RW) return;
      const parts = got.get(dstPort) ?? [];
      parts.push(Buffer.from(payload));
      got.set(dstPort, parts);
    };
    guest.socket.resume();
    await Promise.all(finished);
    await guest.until(() => [...got.values()].flat().reduce((sum, { length }) => sum + length, 0) === 20 * data.length);
    for (const parts of got.values()) expect(Buffer.concat(parts).equals(data)).toBe(true);
  });
});

describe('data of the guest', () => {
  test('is limited to what was said, and its room is told as it is read', async () => {
    const { stream, ports } = await guest.connected();
    const packet = pattern(32_768);
    for (let i = 0; i < HOST_BUFFER / packet.length; i++) guest.send({ ...ports, payload: packet });
    const told = (await guest.quiet()).map(({ op, fwdCnt }) => [op, fwdCnt]);
    expect(told).toEqual([]); // nobody reads
    let got = 0;
    stream.on('data', (chunk: Buffer) => {
      got += chunk.length;
    });
    await guest.until(() => got === HOST_BUFFER);
    const updates = await guest.quiet();
    expect(updates.length).toBeGreaterThan(0);
    expect(updates.length).toBeLessThan(8);
    expect(updates.at(-1)).toMatchObject({ op: Op.CREDIT_UPDATE, bufAlloc: HOST_BUFFER, fwdCnt: HOST_BUFFER });
  });

  test('a byte more resets the connection', async () => {
    const { stream, ports } = await guest.connected();
    for (let left = HOST_BUFFER; left > 0; left -= 32_768) guest.send({ ...ports, payload: pattern(32_768) });
    expect(await guest.quiet()).toEqual([]);
    // The stream itself has taken some, of which the guest does not know.
    for (let i = 0; i < 4; i++) guest.send({ ...ports, payload: pattern(65_536) });
    await guest.next(Op.RST);
    await guest.until(() => stream.closed);
    expect(stream.errored).toMatchObject({ code: 'ERR_VSOCK', message: /more data than there is room for/ });
    expect(guest.warnings).toHaveLength(1);
  });

  test('many short packets take no more memory than long ones', async () => {
    const { stream, ports } = await guest.connected();
    const before = process.memoryUsage();
    for (let i = 0; i < 50_000; i++) guest.send({ ...ports, payload: Uint8Array.of(i) });
    await guest.quiet();
    globalThis.gc?.();
    const after = process.memoryUsage();
    expect(after.arrayBuffers - before.arrayBuffers).toBeLessThan(16 << 20);
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
    expect(await input(stream)).toEqual(Buffer.from(Uint8Array.from({ length: 50_000 }, (_, i) => i)));
  });

  test('a question about credit is answered', async () => {
    const { stream, ports } = await guest.connected();
    stream.on('data', () => {});
    guest.send({ ...ports, payload: pattern(100) });
    await guest.quiet();
    guest.send({ ...ports, op: Op.CREDIT_REQUEST });
    expect(await guest.next(Op.CREDIT_UPDATE)).toMatchObject({ bufAlloc: HOST_BUFFER, fwdCnt: 100 });
  });

  test('every packet tells what was read', async () => {
    const { stream, ports } = await guest.connected();
    guest.send({ ...ports, payload: pattern(123) });
    await once(stream, 'data');
    stream.write('x');
    expect(await guest.next(Op.RW)).toMatchObject({ fwdCnt: 123, bufAlloc: HOST_BUFFER });
  });

  test('a reader that comes late, and reads by pieces', async () => {
    const { stream, ports } = await guest.connected();
    const data = pattern(200_000);
    for (let at = 0; at < data.length; at += 4000) guest.send({ ...ports, payload: data.subarray(at, at + 4000) });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
    await guest.quiet();
    const chunks: Buffer[] = [];
    for await (const chunk of stream) {
      chunks.push(chunk);
      if (chunks.length % 5 === 0) await sleep(1);
    }
    expect(Buffer.concat(chunks).equals(data)).toBe(true);
  });
});

test('64 streams at once, 100 KB each way', async () => {
  const STREAMS = 64;
  const size = 100_000;
  const ends: { stream: VsockStream; end: LawfulEnd; ports: Ports; seed: number }[] = [];
  for (let seed = 0; seed < STREAMS / 2; seed++) {
    const { stream, ports } = await guest.connected(seed, { bufAlloc: 5000 });
    ends.push({ stream, ports, seed, end: new LawfulEnd(guest, ports, first(), 5000) });
  }
  const listener = guest.host.listen(5000);
  for (let seed = STREAMS / 2; seed < STREAMS; seed++) {
    const ports = { srcPort: seed, dstPort: 5000 };
    const answer = await guest.request(ports, { bufAlloc: 50_000 });
    for await (const stream of listener) {
      ends.push({ stream, ports, seed, end: new LawfulEnd(guest, ports, answer, 50_000) });
      break;
    }
  }
  const byPorts = new Map(ends.map(({ ports, end }) => [`${ports.srcPort} ${ports.dstPort}`, end]));
  guest.onPacket = (packet) => byPorts.get(`${packet.dstPort} ${packet.srcPort}`)?.handle(packet);
  const intact = ends.map(async ({ stream, end, seed }) => {
    const chunks: Buffer[] = [];
    stream.on('data', (chunk: Buffer) => chunks.push(chunk));
    end.write(pattern(size, seed));
    stream.write(pattern(size, seed + 1000));
    const got = () => Buffer.concat(chunks);
    while (got().length < size || end.bytes.length < size) await sleep(20);
    return got().equals(pattern(size, seed)) && end.bytes.equals(pattern(size, seed + 1000));
  });
  expect(await Promise.all(intact)).toEqual(ends.map(() => true));

  function first(): Packet {
    return { bufAlloc: HOST_BUFFER, fwdCnt: 0 } as Packet;
  }
});

test('a guest that does not take replies is not read any more, and goes on when it does', async () => {
  const PACKETS = 200_000;
  guest.socket.pause();
  const before = guest.channel.bytesRead;
  for (let i = 0; i < PACKETS; i++) guest.send({ srcPort: i % 1000, dstPort: 1, op: Op.CREDIT_REQUEST });
  let read = -1;
  for (let last = -2; last !== read; await sleep(200)) {
    last = read;
    read = guest.channel.bytesRead - before;
  } // it has stopped
  expect(read).toBeLessThan(PACKETS * 48);
  expect(guest.channel.writableLength).toBeLessThan(2 << 20);
  let resets = 0;
  guest.onPacket = ({ op }) => {
    if (op === Op.RST) resets++;
  };
  guest.socket.resume();
  await guest.until(() => resets === PACKETS);
});

test('a guest with more replies than a queue holds is still read while data waits for it', async () => {
  // Linux stops taking packets when its own replies are as many as its buffers: they must go out first.
  const { stream } = await guest.connected(1, { bufAlloc: 0x8000_0000 });
  guest.socket.pause();
  stream.on('error', () => {});
  stream.write(pattern(1 << 20));
  await sleep(20);
  const before = guest.channel.bytesRead;
  for (let i = 0; i < 2000; i++) guest.send({ srcPort: i, dstPort: 1, op: Op.CREDIT_REQUEST });
  await guest.until(() => guest.channel.bytesRead - before === 2000 * 48);
});
