import { getEventListeners, once } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import type { VsockListener, VsockStream } from '#dist/index.js';
import { FakeGuest, GUEST_BUFFER, input } from './fake-guest.js';
import { Op, pattern, Shutdown, STREAM } from './packets.js';

const MAX_CONNECTIONS = 1024;
const BACKLOG = 128;
const PORTS = { srcPort: 1000, dstPort: 5000 };

let guest: FakeGuest;
beforeEach(async () => {
  guest = await FakeGuest.make();
});
afterEach(async () => {
  vi.useRealTimers();
  await guest[Symbol.asyncDispose]();
});

/** A connection of the guest that the host has accepted. */
async function accepted(ports = PORTS): Promise<{ stream: VsockStream; listener: VsockListener }> {
  const listener = guest.host.listen(ports.dstPort);
  await guest.request(ports);
  for await (const stream of listener) return { stream, listener };
  throw new Error('closed');
}

/** Whatever the reason. */
async function closed(stream: VsockStream): Promise<void> {
  if (!stream.closed) await new Promise<void>((resolve) => stream.once('close', resolve));
}

describe('the host connects', () => {
  test('a request, an answer, data both ways', async () => {
    const connecting = guest.host.connect(1000);
    const request = await guest.next(Op.REQUEST);
    expect(request).toMatchObject({ srcCid: 2n, dstCid: 3n, dstPort: 1000, type: STREAM, len: 0, fwdCnt: 0, flags: 0 });
    expect(request.bufAlloc).toBeGreaterThanOrEqual(65_536);
    const ports = { srcPort: 1000, dstPort: request.srcPort };
    guest.send({ ...ports, op: Op.RESPONSE });
    const stream = await connecting;
    expect(stream).toMatchObject({ localPort: request.srcPort, remotePort: 1000 });
    stream.write(pattern(3000));
    expect((await guest.next(Op.RW)).payload).toEqual(pattern(3000));
    guest.send({ ...ports, payload: pattern(2000, 1) });
    expect((await once(stream, 'data'))[0]).toEqual(Buffer.from(pattern(2000, 1)));
  });

  test('two connections to a port have ports of their own, past those that are listened on', async () => {
    const { stream } = await guest.connected();
    const listener = guest.host.listen(stream.localPort + 1);
    const { stream: other } = await guest.connected();
    expect(other.localPort).toBe(stream.localPort + 2);
    await listener.close();
  });

  test('a refusal', async () => {
    const connecting = guest.host.connect(1000);
    const { srcPort } = await guest.next(Op.REQUEST);
    guest.send({ srcPort: 1000, dstPort: srcPort, op: Op.RST });
    await expect(connecting).rejects.toMatchObject({
      code: 'ERR_VSOCK',
      message: 'vsock: port 1000 of the guest: connection refused',
    });
    expect(await guest.quiet()).toEqual([]);
  });

  test('no answer in time: the guest is told, and a late answer is reset', async () => {
    const connecting = guest.host.connect(1000, { timeout: 30 });
    const { srcPort } = await guest.next(Op.REQUEST);
    await expect(connecting).rejects.toMatchObject({ code: 'ERR_VSOCK', message: /no answer in 30 ms/ });
    await guest.next(Op.RST);
    guest.send({ srcPort: 1000, dstPort: srcPort, op: Op.RESPONSE });
    expect(await guest.quiet()).toMatchObject([{ op: Op.RST, srcPort, dstPort: 1000 }]);
  });

  test('a signal', async () => {
    const reason = new Error('no more');
    await expect(guest.host.connect(1000, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    const controller = new AbortController();
    const connecting = guest.host.connect(1000, { signal: controller.signal });
    await guest.next(Op.REQUEST);
    controller.abort('of any kind');
    await expect(connecting).rejects.toBe('of any kind');
    await guest.next(Op.RST);

    const kept = new AbortController();
    const { stream } = await guest.connected();
    const again = guest.host.connect(1001, { signal: kept.signal });
    const { srcPort } = await guest.next(Op.REQUEST);
    guest.send({ srcPort: 1001, dstPort: srcPort, op: Op.RESPONSE });
    const connected = await again;
    expect(getEventListeners(kept.signal, 'abort')).toEqual([]);
    kept.abort(); // too late
    await turn();
    expect([stream.destroyed, connected.destroyed]).toEqual([false, false]);
  });

  test.each([-1, 2 ** 32 - 1, 1.5, Number.NaN])('no such port: %d', async (port) => {
    await expect(guest.host.connect(port)).rejects.toMatchObject({ code: 'ERR_USAGE' });
    expect(() => guest.host.listen(port)).toThrow(/is not a number from 0 to 2\^32 - 2/);
  });

  test.each([0, -1, 2 ** 31, Number.NaN])('no such timeout: %d', async (timeout) => {
    await expect(guest.host.connect(1, { timeout })).rejects.toMatchObject({ code: 'ERR_USAGE' });
  });

  test.each([
    ['data', { op: Op.RW, payload: pattern(5) }],
    ['a request', { op: Op.REQUEST }],
    ['an answer that has taken bytes', { op: Op.RESPONSE, fwdCnt: 1 }],
  ])('%s instead of an answer resets it', async (_, fields) => {
    const connecting = guest.host.connect(1000);
    const { srcPort } = await guest.next(Op.REQUEST);
    guest.send({ srcPort: 1000, dstPort: srcPort, ...fields });
    await expect(connecting).rejects.toMatchObject({ code: 'ERR_VSOCK', message: /broke the protocol/ });
    await guest.next(Op.RST);
    expect(guest.warnings).toHaveLength(1);
  });
});

describe('the guest connects', () => {
  test('to a listener', async () => {
    const listener = guest.host.listen(5000);
    expect(await guest.request(PORTS)).toMatchObject({ srcPort: 5000, dstPort: 1000, type: STREAM });
    guest.send({ ...PORTS, payload: pattern(10) }); // before it is accepted
    for await (const stream of listener) {
      expect(stream).toMatchObject({ localPort: 5000, remotePort: 1000 });
      expect((await once(stream, 'data'))[0]).toEqual(Buffer.from(pattern(10)));
      break;
    }
    await guest.request({ ...PORTS, srcPort: 1001 }); // it goes on after the loop
  });

  test('to nobody', async () => {
    guest.send({ ...PORTS, op: Op.REQUEST });
    expect(await guest.next(Op.RST)).toMatchObject({ srcPort: 5000, dstPort: 1000, type: STREAM });
  });

  test('a port has one listener at a time', async () => {
    const listener = guest.host.listen(5000);
    expect(() => guest.host.listen(5000)).toThrow(/port 5000 of the host has a listener already/);
    await listener.close();
    await listener.close();
    guest.host.listen(5000);
  });

  test('closing a listener ends its loops, resets what waits and keeps what was accepted', async () => {
    const { stream, listener } = await accepted();
    await guest.request({ ...PORTS, srcPort: 1001 });
    const loops = [0, 1].map(async () => {
      for await (const one of listener) if (one.remotePort !== 1001) return 'accepted';
      return 'ended';
    });
    await turn();
    await guest.request({ ...PORTS, srcPort: 1002 });
    await guest.request({ ...PORTS, srcPort: 1003 });
    await guest.request({ ...PORTS, srcPort: 1004 });
    await guest.request({ ...PORTS, srcPort: 1005 });
    await listener.close();
    expect((await Promise.all(loops)).sort()).toEqual(['accepted', 'accepted']);
    expect(stream.destroyed).toBe(false);
    const resets = await guest.quiet();
    expect(resets.map(({ op, dstPort }) => [op, dstPort])).toEqual([
      [Op.RST, 1004],
      [Op.RST, 1005],
    ]);
    for await (const _ of listener) throw new Error('it is closed');
  });

  test('a loop that waits ends with its listener', async () => {
    const listener = guest.host.listen(5000);
    const loop = (async () => {
      for await (const _ of listener) throw new Error('nobody connects');
    })();
    await turn();
    await listener.close();
    await loop;
  });

  test('connections that nobody accepts are limited, and those that end are not counted', async () => {
    const listener = guest.host.listen(5000);
    for (let srcPort = 0; srcPort < BACKLOG; srcPort++) await guest.request({ ...PORTS, srcPort });
    guest.send({ srcPort: 500, dstPort: 5000, op: Op.REQUEST });
    await guest.next(Op.RST);
    expect(guest.warnings).toEqual([expect.stringMatching(/too many connections of the guest to port 5000/)]);
    guest.send({ srcPort: 7, dstPort: 5000, op: Op.RST });
    await guest.quiet();
    await guest.request({ srcPort: 500, dstPort: 5000 });
    const seen: number[] = [];
    for await (const { remotePort } of listener) {
      seen.push(remotePort);
      if (seen.length === BACKLOG) break;
    }
    expect(seen).not.toContain(7);
    expect(seen.at(-1)).toBe(500);
  });

  test('connections are limited, also those that the guest has ended and nobody has read', async () => {
    const listener = guest.host.listen(5000);
    const streams: VsockStream[] = [];
    void (async () => {
      for await (const stream of listener) streams.push(stream);
    })();
    for (let srcPort = 0; srcPort < MAX_CONNECTIONS; srcPort++) {
      await guest.request({ srcPort, dstPort: 5000 });
      guest.send({ srcPort, dstPort: 5000, payload: pattern(10) });
      guest.send({ srcPort, dstPort: 5000, op: Op.SHUTDOWN, flags: Shutdown.BOTH });
      await guest.next(Op.RST);
    }
    guest.send({ srcPort: 5, dstPort: 5000, op: Op.REQUEST });
    await guest.next(Op.RST);
    await expect(guest.host.connect(1)).rejects.toThrow(/there are 1024 connections already/);
    expect(guest.warnings).toHaveLength(1);
    streams[9]?.destroy();
    await guest.request({ srcPort: 5, dstPort: 5000 });
  });

  test('a request that breaks the protocol', async () => {
    guest.host.listen(5000);
    guest.send({ ...PORTS, op: Op.REQUEST, fwdCnt: 9 });
    await guest.next(Op.RST);
    await guest.request(PORTS);
  });
});

describe('ends', () => {
  test('the host ends first', async () => {
    const { stream, ports } = await guest.connected();
    stream.end(pattern(10));
    await guest.next(Op.RW);
    expect(await guest.next(Op.SHUTDOWN)).toMatchObject({ flags: Shutdown.SEND });
    guest.send({ ...ports, payload: pattern(20), fwdCnt: 10 });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND, fwdCnt: 10 });
    expect(await input(stream)).toEqual(Buffer.from(pattern(20)));
    expect(await guest.next(Op.SHUTDOWN)).toMatchObject({ flags: Shutdown.BOTH });
    guest.send({ ...ports, op: Op.RST });
    await closed(stream);
    expect(stream.errored).toBe(null);
    expect(await guest.quiet()).toEqual([]);
  });

  test('the guest ends first', async () => {
    const { stream, ports } = await guest.connected();
    guest.send({ ...ports, payload: pattern(20) });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
    expect(await input(stream)).toEqual(Buffer.from(pattern(20)));
    stream.end(pattern(30));
    expect((await guest.next(Op.RW)).payload).toEqual(pattern(30));
    expect(await guest.next(Op.SHUTDOWN)).toMatchObject({ flags: Shutdown.BOTH });
    guest.send({ ...ports, op: Op.RST, fwdCnt: 30 });
    expect(await guest.quiet()).toEqual([]);
    expect(stream.errored).toBe(null);
  });

  test('the guest closes: it is answered at once, and what it sent can still be read', async () => {
    const { stream, ports } = await guest.connected();
    guest.send({ ...ports, payload: pattern(20_000) });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.BOTH });
    await guest.next(Op.RST);
    expect(await input(stream)).toEqual(Buffer.from(pattern(20_000)));
    const written = new Promise<Error | null | undefined>((resolve) => void stream.write('x', resolve));
    expect(await written).toMatchObject({ code: 'ERR_VSOCK', message: /the guest reads no more/ });
  });

  test('the ends of the guest add up', async () => {
    const { stream, ports } = await guest.connected();
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.RCV });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: 0 });
    expect(await guest.quiet()).toEqual([]);
    guest.send({ ...ports, payload: pattern(9) });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND | 0xfff0 });
    await guest.next(Op.RST);
    expect(await input(stream)).toHaveLength(9);
  });

  test('the guest reads no more while data waits', async () => {
    const { stream, ports } = await guest.connected(1000, { bufAlloc: 100 });
    const failed = closed(stream);
    stream.write(pattern(1000));
    await guest.next(Op.RW);
    await guest.next(Op.CREDIT_REQUEST);
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.RCV });
    await failed;
    expect(stream.errored).toMatchObject({ code: 'ERR_VSOCK' });
    await guest.next(Op.RST);
  });

  test('an end that the guest does not confirm is forced', async () => {
    const { stream, ports } = await guest.connected();
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
    const ended = input(stream);
    await ended;
    stream.end();
    await closed(stream);
    vi.advanceTimersByTime(7999);
    vi.useRealTimers();
    await guest.next(Op.SHUTDOWN);
    expect(guest.packets).toEqual([]);
  });

  test('… after 8 s', async () => {
    const { stream, ports } = await guest.connected();
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
    const ended = input(stream);
    await ended;
    stream.end();
    await closed(stream);
    vi.advanceTimersByTime(8000);
    vi.useRealTimers();
    await guest.next(Op.SHUTDOWN);
    await guest.next(Op.RST);
    guest.send({ ...ports, op: Op.CREDIT_UPDATE });
    await guest.next(Op.RST); // it is forgotten
  });

  test('the guest ends more than once: it hears of our end once', async () => {
    const { stream, ports } = await guest.connected();
    stream.end();
    await guest.next(Op.SHUTDOWN);
    for (let i = 0; i < 3; i++) guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
    expect((await guest.quiet()).map(({ op, flags }) => [op, flags])).toEqual([[Op.SHUTDOWN, Shutdown.BOTH]]);
  });

  test('a write that is under way when its stream is destroyed is told of', async () => {
    const { stream } = await guest.connected(1000, { bufAlloc: 10 });
    const error = new Error('enough');
    const written = new Promise<Error | null | undefined>((resolve) => void stream.write(pattern(20), resolve));
    await guest.next(Op.RW);
    stream.destroy(error);
    expect(await written).toBe(error);
  });

  test('a stream that is destroyed resets its connection', async () => {
    const { stream, ports } = await guest.connected();
    stream.destroy();
    expect(await guest.next(Op.RST)).toMatchObject({ srcPort: ports.dstPort, dstPort: ports.srcPort });
    guest.send({ ...ports, payload: pattern(5) });
    await guest.next(Op.RST);
  });

  test('the guest resets', async () => {
    const { stream, ports } = await guest.connected();
    stream.write(pattern(GUEST_BUFFER + 1));
    guest.send({ ...ports, op: Op.RST });
    await closed(stream);
    expect(stream.errored).toMatchObject({ code: 'ERR_VSOCK', message: /the guest reset the connection/ });
    expect((await guest.quiet()).map(({ op }) => op)).not.toContain(Op.RST);
  });
});

describe('the end of the guest and of the machine', () => {
  test('without a driver nothing is sent', async () => {
    await guest.driver(false);
    await expect(guest.host.connect(1000)).rejects.toThrow(/the guest has no vsock driver running/);
    await guest.driver(true);
    expect(guest.packets).toEqual([]);
  });

  test('a reset of the guest ends its connections, not its listeners', async () => {
    const { stream } = await accepted();
    const { stream: other } = await guest.connected();
    const connecting = guest.host.connect(1000);
    const reset = { code: 'ERR_VSOCK', message: 'vsock: the guest was reset' };
    const refused = expect(connecting).rejects.toMatchObject(reset);
    await guest.next(Op.REQUEST);
    await guest.driver(true);
    await refused;
    expect([stream.errored, other.errored]).toMatchObject([reset, reset]);
    expect(await guest.quiet()).toEqual([]);
    await guest.request(PORTS);
  });

  test('what was sent to the driver of before is before the answer to a notice', async () => {
    const { stream } = await guest.connected();
    stream.write(pattern(100));
    await guest.driver(false);
    expect(guest.packets.map(({ op }) => op)).toEqual([Op.RW]);
  });

  test('the end of the machine destroys all streams with its error, after what the guest has sent', async () => {
    const { stream, listener } = await accepted();
    const { stream: other, ports } = await guest.connected();
    const got = new Promise((resolve) => stream.once('data', resolve));
    const loop = (async () => {
      for await (const _ of listener) throw new Error('nobody connects');
    })();
    const connecting = guest.host.connect(1000);
    const end = new Error('the machine has ended');
    const rejected = expect(connecting).rejects.toBe(end);
    await turn();
    guest.send({ ...PORTS, payload: pattern(10) });
    guest.send({ ...ports, op: Op.RST });
    guest.host.close(end);
    guest.host.close(new Error('not again'));
    guest.socket.end();
    await loop;
    await rejected;
    expect(await got).toHaveLength(10);
    expect(stream.errored).toBe(end);
    expect(other.errored).toMatchObject({ message: /the guest reset/ });
    await expect(guest.host.connect(1000)).rejects.toBe(end);
    expect(() => guest.host.listen(1)).toThrow(end);
  });

  test('… at once when the device is gone already', async () => {
    const { stream } = await guest.connected();
    guest.channel.destroy();
    await once(guest.channel, 'close');
    expect(stream.destroyed).toBe(false);
    const end = new Error('the machine thread died');
    guest.host.close(end);
    expect(stream.errored).toBe(end);
  });
});

describe('packets that belong to nothing', () => {
  test.each([Op.INVALID, Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, 99])(
    'operation %d is answered with a reset',
    async (op) => {
      guest.send({ ...PORTS, op, payload: op === Op.RW ? pattern(100) : pattern(0) });
      expect(await guest.next(Op.RST)).toMatchObject({ srcPort: 5000, dstPort: 1000, type: STREAM });
    },
  );

  test('a reset is not', async () => {
    guest.send({ ...PORTS, op: Op.RST });
    guest.send({ ...PORTS, op: Op.RST, type: 7 });
    expect(await guest.quiet()).toEqual([]);
  });

  test('5.10.6.4.2: a RST reply MUST be sent if a packet is received with an unknown type value', async () => {
    guest.host.listen(5000);
    const { stream, ports } = await guest.connected();
    for (const type of [0, 2, 0xffff]) {
      guest.send({ ...PORTS, op: Op.REQUEST, type });
      expect(await guest.next(Op.RST)).toMatchObject({ type, srcPort: 5000, dstPort: 1000 });
      guest.send({ ...ports, op: Op.RW, type, payload: pattern(5) });
      expect(await guest.next(Op.RST)).toMatchObject({ type, srcPort: ports.dstPort });
    }
    expect(stream.destroyed).toBe(false); // it is of another type
  });
});

describe('packets that break the protocol reset their connection', () => {
  test.each([
    ['a second request', { op: Op.REQUEST }],
    ['a second answer', { op: Op.RESPONSE }],
    ['no operation', { op: Op.INVALID }],
    ['an unknown operation', { op: 8 }],
    ['bytes taken that were not sent', { op: Op.CREDIT_UPDATE, fwdCnt: 1 }],
    ['bytes taken back', { op: Op.CREDIT_UPDATE, fwdCnt: 0xffff_ffff }],
  ])('%s', async (_, fields) => {
    const { stream, ports } = await guest.connected();
    guest.send({ ...ports, ...fields });
    await guest.next(Op.RST);
    await closed(stream);
    expect(stream.errored).toMatchObject({ code: 'ERR_VSOCK', message: /broke the protocol/ });
    expect(guest.warnings).toHaveLength(1);
  });

  test('data after its end', async () => {
    const { stream, ports } = await guest.connected();
    guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
    guest.send({ ...ports, payload: pattern(1) });
    await guest.next(Op.RST);
    await closed(stream);
    expect(stream.errored).toMatchObject({ message: /data after its end/ });
  });

  test('a channel that is broken is given up', async () => {
    const { stream } = await guest.connected();
    guest.socket.write(Buffer.from([0, 0xff, 0xff, 0xff]));
    await once(guest.channel, 'close');
    stream.write('x');
    guest.host.close(new Error('over'));
    expect(stream.errored).toMatchObject({ message: 'over' });
  });
});
