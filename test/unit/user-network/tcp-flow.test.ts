import { setTimeout } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { Random } from '../../kvm/assist/random.js';
import { Guest } from './guest.js';
import { DNS, SYN, tcp } from './packets.js';
import { distinct, eventually, HostServer, readAll, steady } from './support.js';

const MIB = 1024 * 1024;
/** A SYN to a port of the DNS server that does not exist: it costs a reset. */
const UNKNOWN = tcp(DNS, { sourcePort: 1, destinationPort: 1, sequence: 0, flags: SYN });
const WINDOWS = { receiveBuffer: 64 * 1024, sendBuffer: 128 * 1024 };

test('a host that does not read stops the guest, and what is held stays bounded', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: WINDOWS });
  const connection = await guest.tcp.connect(host.port);
  const socket = await host.next();
  const data = distinct(12 * MIB);
  connection.write(data);
  const left = await steady(() => connection.unacknowledged);
  expect(left).toBeGreaterThan(MIB); // the kernel's buffers have swallowed the rest
  expect(connection.peerWindow).toBe(0);
  expect(guest.network.counters.tcpBufferedNow).toBeLessThanOrEqual(WINDOWS.receiveBuffer + 1);
  connection.end();
  expect((await readAll(socket)).equals(data)).toBe(true);
  await connection.until((c) => c.finAcked);
  expect(guest.network.counters.tcpBufferedNow).toBe(0);
  expect(guest.faults).toEqual([]);
});

test('a guest that does not read stops the host, and what is held stays bounded', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { ...WINDOWS, minimumTimeout: 50, firstTimeout: 50 } });
  const connection = await guest.tcp.connect(host.port, { window: 100_000 });
  const socket = await host.next();
  connection.pause();
  const data = distinct(12 * MIB);
  socket.end(data);
  expect(100_000 - (await steady(() => connection.received))).toBeLessThan(128); // the window's scale
  expect(socket.writableLength).toBeGreaterThan(MIB);
  const { counters } = guest.network;
  expect(counters.tcpBufferedNow).toBeGreaterThanOrEqual(WINDOWS.sendBuffer);
  expect(counters.tcpBufferedNow).toBeLessThanOrEqual(WINDOWS.sendBuffer + 64 * 1024);
  const probes = connection.acks;
  await connection.until((c) => c.acks > probes); // the window is probed while it is closed
  connection.resume();
  await connection.until((c) => c.ended);
  expect(connection.data.equals(data)).toBe(true);
  expect(guest.faults).toEqual([]);
});

test('a window that opens is found although its announcement is lost', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { ...WINDOWS, minimumTimeout: 50, firstTimeout: 50 } });
  const connection = await guest.tcp.connect(host.port, { window: 100_000 });
  connection.pause();
  (await host.next()).end(distinct(MIB));
  await steady(() => connection.received);
  guest.trouble = { random: new Random(1), drop: 100, duplicate: 0, reorder: 0 };
  connection.resume();
  guest.trouble = undefined;
  await connection.until((c) => c.ended);
  expect(connection.received).toBe(MIB);
});

test('a device that does not read stops the host', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: WINDOWS });
  guest.setOffloads(3);
  const connections = await Promise.all(
    Array.from({ length: 8 }, () => guest.tcp.connect(host.port, { window: 4 * MIB })),
  );
  guest.socket.pause();
  const data = distinct(6 * MIB);
  for (const _ of connections) (await host.next()).end(data);
  const { counters } = guest.network;
  const sent = await steady(() => counters.bytesToGuest);
  // What the network holds, what waits in Node, and what is in the kernel.
  expect(sent).toBeLessThan(2 * MIB);
  expect(counters.tcpBufferedNow).toBeLessThanOrEqual(8 * (WINDOWS.sendBuffer + 64 * 1024));
  expect(counters.dropped.linkFull).toBe(0);
  guest.socket.resume();
  for (const connection of connections) await connection.until((c) => c.ended);
  for (const connection of connections) expect(connection.data.equals(data)).toBe(true);
  expect(counters.tcpRetransmissions).toBe(0);
  expect(guest.faults).toEqual([]);
});

test('answers to a guest that never reads are dropped, not stored', async () => {
  await using guest = await Guest.open();
  guest.announce();
  await guest.settle();
  guest.socket.pause();
  const { counters } = guest.network;
  for (let i = 0; counters.dropped.linkFull === 0; i++) {
    for (let k = 0; k < 1000; k++) guest.send(UNKNOWN);
    await eventually(() => guest.socket.writableLength === 0);
    expect(i).toBeLessThan(100);
  }
  guest.socket.resume();
  await steady(() => guest.frameCount);
  await guest.settle();
});

test('all connections together hold no more than they may', async () => {
  const totalBuffer = 256 * 1024;
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { ...WINDOWS, totalBuffer } });
  const connections = await Promise.all(
    Array.from({ length: 20 }, () => guest.tcp.connect(host.port, { window: 20_000 })),
  );
  const sockets = [];
  for (const connection of connections) {
    connection.pause();
    sockets.push(await host.next());
  }
  const data = distinct(MIB);
  for (const socket of sockets) socket.end(data);
  const held = await steady(() => guest.network.counters.tcpBufferedNow);
  expect(held).toBeGreaterThanOrEqual(totalBuffer);
  // Each socket that was being read may have brought one more chunk.
  expect(held).toBeLessThanOrEqual(totalBuffer + 20 * 64 * 1024);
  for (const connection of connections) connection.resume();
  for (const connection of connections) await connection.until((c) => c.ended);
  for (const connection of connections) expect(connection.data.equals(data)).toBe(true);
  await eventually(() => guest.network.counters.tcpBufferedNow === 0);
});

test.each([
  ['complete checksums', 0],
  ['large segments', 3],
])('data survives loss, repetition and reordering both ways, %s', async (_name, offloads) => {
  const random = new Random();
  try {
    await using host = await HostServer.open();
    const tuning = { minimumTimeout: 60, firstTimeout: 60, maximumTimeout: 500 };
    await using guest = await Guest.open({ tuning });
    guest.setOffloads(offloads);
    const large = offloads === 3;
    guest.trouble = { random, drop: large ? 10 : 3, duplicate: 3, reorder: 5 };
    const connection = await guest.tcp.connect(host.port, { largeSegments: large ? 20_000 : 0, window: 128 * 1024 });
    expect(connection.state).toBe('open');
    const socket = await host.next();
    const [up, down] = [distinct(2_000_001), distinct(2_000_003)];
    connection.write(up);
    connection.end();
    socket.end(down);
    expect((await readAll(socket)).equals(up)).toBe(true);
    await connection.until((c) => c.ended && c.finAcked);
    expect(connection.data.equals(down)).toBe(true);
    expect(guest.network.counters.tcpRetransmissions).toBeGreaterThan(0);
    expect(guest.faults).toEqual([]);
  } catch (error) {
    throw new Error(`TSVISOR_SEED=${random.seed}`, { cause: error });
  }
});

test('one lost segment is sent again before the timeout', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { minimumTimeout: 600_000, firstTimeout: 600_000 } });
  const connection = await guest.tcp.connect(host.port);
  const socket = await host.next();
  const input = guest.tcp.input.bind(guest.tcp);
  let count = 0;
  guest.tcp.input = (segment) => {
    // The tenth and the twentieth segment of data are lost once.
    if (segment.payload.length > 0 && [10, 20].includes(++count)) return;
    input(segment);
  };
  const data = distinct(200_000);
  socket.end(data);
  await connection.until((c) => c.ended);
  expect(connection.data.equals(data)).toBe(true);
  expect(guest.network.counters.tcpRetransmissions).toBeLessThanOrEqual(4);
});

test('a guest that falls silent is given up', async () => {
  await using host = await HostServer.open();
  const tuning = { minimumTimeout: 10, firstTimeout: 10, maximumTimeout: 20, retries: 4 };
  await using guest = await Guest.open({ tuning });
  await guest.tcp.connect(host.port);
  const socket = await host.next();
  guest.trouble = { random: new Random(1), drop: 100, duplicate: 0, reorder: 0 };
  socket.on('error', () => {});
  socket.write('anybody there?');
  socket.resume();
  await eventually(() => socket.destroyed);
  expect(guest.network.counters.tcpNow).toBe(0);
});

test('a guest that falls silent with its window closed is given up', async () => {
  await using host = await HostServer.open();
  const tuning = { ...WINDOWS, minimumTimeout: 10, firstTimeout: 10, maximumTimeout: 20, retries: 4 };
  await using guest = await Guest.open({ tuning });
  const connection = await guest.tcp.connect(host.port, { window: 10_000 });
  connection.pause();
  const socket = await host.next();
  socket.on('error', () => {});
  socket.write(distinct(MIB));
  socket.resume();
  await steady(() => connection.received);
  expect(guest.network.counters.tcpNow).toBe(1); // as long as it answers it may take its time
  guest.trouble = { random: new Random(1), drop: 100, duplicate: 0, reorder: 0 };
  await eventually(() => socket.destroyed);
  expect(guest.network.counters.tcpNow).toBe(0);
});

test('an idle guest that has forgotten its connection is found out', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { keepAlive: 50, sweep: 20 } });
  const connection = await guest.tcp.connect(host.port);
  const alive = connection.segments;
  await connection.until((c) => c.segments > alive + 3); // it answers, so it stays
  expect(guest.network.counters.tcpNow).toBe(1);
  guest.tcp.forget();
  await eventually(() => guest.network.counters.tcpNow === 0);
});

test('little data is acknowledged with the answer, not on its own', async () => {
  await using host = await HostServer.open((socket) => socket.on('data', (data) => socket.write(data)));
  await using guest = await Guest.open({ tuning: { delayedAck: 60_000 } });
  const connection = await guest.tcp.connect(host.port);
  for (let i = 1; i <= 10; i++) {
    connection.write(Buffer.from('ping'));
    await connection.until((c) => c.received === 4 * i);
  }
  expect(connection.acks).toBe(1); // the SYN-ACK has no data either
  expect(connection.unacknowledged).toBe(0);
});

test('bulk data takes few acknowledgements', async () => {
  await using host = await HostServer.open((socket) => socket.resume());
  await using guest = await Guest.open();
  guest.setOffloads(3);
  const connection = await guest.tcp.connect(host.port, { largeSegments: 60_000 });
  connection.write(distinct(6 * MIB));
  await connection.until((c) => c.unacknowledged === 0);
  expect(connection.acks).toBeLessThan((6 * MIB) / 60_000 + 5);
});

test('connections beyond the limit are refused, and room is made again', async () => {
  await using host = await HostServer.open((socket) => socket.resume().on('end', () => socket.end()));
  await using guest = await Guest.open({ tuning: { connections: 10, timeWait: 60_000 } });
  const open = await Promise.all(Array.from({ length: 10 }, () => guest.tcp.connect(host.port)));
  expect(open.map((c) => c.state)).toEqual(Array(10).fill('open'));
  const refused = await guest.tcp.connect(host.port);
  expect(refused.state).toBe('reset');
  expect(guest.network.counters).toMatchObject({ tcpNow: 10, dropped: { limit: 1 } });
  open[0]?.end();
  await open[0]?.until((c) => c.ended && c.finAcked);
  await eventually(() => guest.network.counters.tcpNow === 9);
  expect((await guest.tcp.connect(host.port)).state).toBe('open');
});

test('half-open connections are limited on their own', async () => {
  let asked = 0;
  const never = new Promise<boolean>(() => {});
  const allow = () => {
    asked++;
    return never;
  };
  await using guest = await Guest.open({ allow, tuning: { halfOpen: 5 } });
  for (let i = 0; i < 8; i++) guest.tcp.start(80, {}, '192.0.2.1');
  await guest.settle();
  await setTimeout(0);
  expect(asked).toBe(5);
  expect(guest.network.counters.dropped.limit).toBeGreaterThanOrEqual(3);
  expect(guest.network.counters.tcpNow).toBe(5);
});
