import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { VsockHost } from '#dist/backends/vsock/vsock-host.js';
import { FakeGuest, input } from './fake-guest.js';
import { Op, pattern, Shutdown } from './packets.js';

let folder: string;
let path: string;
let guest: FakeGuest;
beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'tsvisor-hybrid-'));
  path = join(folder, 'vsock.sock');
  guest = await FakeGuest.make({ socket: path });
});
afterEach(async () => {
  vi.useRealTimers();
  await guest[Symbol.asyncDispose]();
  rmSync(folder, { recursive: true });
});

const open = (socket: string) => VsockHost.open({ cid: 3, socket, warn: () => {} });

function client(request = ''): Socket {
  const socket = connect({ path, allowHalfOpen: true });
  socket.on('error', () => {});
  if (request !== '') socket.write(request);
  return socket;
}

/** A client that the guest has accepted. */
async function connected() {
  const socket = client('CONNECT 1000\n');
  const request = await guest.next(Op.REQUEST);
  const ports = { srcPort: 1000, dstPort: request.srcPort };
  guest.send({ ...ports, op: Op.RESPONSE });
  expect(String((await once(socket, 'data'))[0])).toBe(`OK ${ports.dstPort}\n`);
  return { socket, ports };
}

/** What a client gets until it is disconnected. */
async function ended(socket: Socket): Promise<Buffer> {
  const chunks: Buffer[] = [];
  socket.on('data', (chunk: Buffer) => chunks.push(chunk));
  await new Promise((resolve) => socket.once('end', resolve).once('close', resolve));
  socket.destroy();
  return Buffer.concat(chunks);
}

test('a client connects, and each end ends by itself', async () => {
  const { socket, ports } = await connected();
  socket.end(pattern(5000));
  let got = 0;
  while (got < 5000) got += (await guest.next(Op.RW)).len;
  expect(await guest.next(Op.SHUTDOWN)).toMatchObject({ flags: Shutdown.SEND });
  guest.send({ ...ports, payload: pattern(3000), fwdCnt: 5000 });
  guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.BOTH, fwdCnt: 5000 });
  expect(await ended(socket)).toEqual(Buffer.from(pattern(3000)));
  await guest.next(Op.RST);
});

test('the request in pieces, with data behind it', async () => {
  const socket = client();
  for (const byte of 'CONNECT 10') {
    socket.write(byte);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
  socket.write('00\nhello\nCONNECT 5\n');
  const { srcPort, dstPort } = await guest.next(Op.REQUEST);
  expect(dstPort).toBe(1000);
  guest.send({ srcPort: 1000, dstPort: srcPort, op: Op.RESPONSE });
  expect(Buffer.from((await guest.next(Op.RW)).payload).toString()).toBe('hello\nCONNECT 5\n');
  socket.destroy();
});

test.each([
  'connect 1000\n',
  'CONNECT\n',
  'CONNECT x\n',
  'CONNECT -1\n',
  'CONNECT 4294967295\n',
  'CONNECT 99999999999\n',
  'CONNECT 1000\r\n',
  '\n',
  'x'.repeat(32),
  `CONNECT ${'0'.repeat(100)}\n`,
])('not a request: %j', async (request) => {
  expect(await ended(client(request))).toHaveLength(0);
  expect(await guest.quiet()).toEqual([]);
});

test('a client that ends before it asks, or asks for nothing in time', async () => {
  const early = client();
  early.end('CONN');
  expect(await ended(early)).toHaveLength(0);
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
  const slow = client('CONNECT');
  await once(slow, 'connect');
  while (vi.getTimerCount() === 0) await new Promise((resolve) => setImmediate(resolve));
  vi.advanceTimersByTime(5000);
  expect(await ended(slow)).toHaveLength(0);
});

test('a port that refuses', async () => {
  const socket = client('CONNECT 1000\n');
  const { srcPort } = await guest.next(Op.REQUEST);
  guest.send({ srcPort: 1000, dstPort: srcPort, op: Op.RST });
  expect(await ended(socket)).toHaveLength(0);
});

test('a client that vanishes while its connection is made', async () => {
  const socket = client('CONNECT 1000\n');
  const { srcPort } = await guest.next(Op.REQUEST);
  socket.destroy();
  await once(socket, 'close');
  await new Promise((resolve) => setTimeout(resolve, 20));
  guest.send({ srcPort: 1000, dstPort: srcPort, op: Op.RESPONSE });
  guest.send({ srcPort: 1000, dstPort: srcPort, payload: pattern(10) });
  await guest.until(() => guest.packets.some(({ op }) => op === Op.RST || op === Op.SHUTDOWN));
});

test('a guest that resets disconnects the client', async () => {
  const { socket, ports } = await connected();
  guest.send({ ...ports, op: Op.RST });
  expect(await ended(socket)).toHaveLength(0);
});

test('the guest reaches a Unix socket by its port, unless somebody listens here', async () => {
  const server = createServer({ allowHalfOpen: true }, async (socket) => socket.end(await input(socket)));
  server.listen(`${path}_52`);
  await once(server, 'listening');
  const ports = { srcPort: 7, dstPort: 52 };
  await guest.request(ports);
  guest.send({ ...ports, payload: pattern(100) });
  guest.send({ ...ports, op: Op.SHUTDOWN, flags: Shutdown.SEND });
  expect((await guest.next(Op.RW)).payload).toEqual(pattern(100));
  await guest.next(Op.SHUTDOWN);
  guest.send({ ...ports, op: Op.RST, fwdCnt: 100 });

  const listener = guest.host.listen(52);
  await guest.request(ports);
  for await (const stream of listener) {
    expect(stream.remotePort).toBe(7);
    break;
  }
  server.close();
});

test('where nobody listens the guest is refused', async () => {
  guest.send({ srcPort: 7, dstPort: 53, op: Op.REQUEST });
  expect(await guest.next(Op.RST)).toMatchObject({ srcPort: 53, dstPort: 7 });
  writeFileSync(`${path}_54`, '');
  guest.send({ srcPort: 7, dstPort: 54, op: Op.REQUEST });
  await guest.next(Op.RST);
  expect(await guest.quiet()).toEqual([]);
});

test('a guest that does not wait for its connection to a Unix socket', async () => {
  const server = createServer({ allowHalfOpen: true }, (socket) => socket.resume()).listen(`${path}_52`);
  await once(server, 'listening');
  for (const op of [Op.RST, Op.RW]) {
    guest.socket.cork();
    guest.send({ srcPort: 7, dstPort: 52, op: Op.REQUEST });
    guest.send({ srcPort: 7, dstPort: 52, op });
    guest.socket.uncork();
    expect((await guest.quiet()).map(({ op }) => op)).toEqual(op === Op.RST ? [] : [Op.RST]);
  }
  await new Promise((resolve) => setTimeout(resolve, 20));
  expect(guest.packets).toEqual([]);
  server.close();
});

test('only this user may connect, and the path is there as long as the machine', async () => {
  expect(statSync(path).mode & 0o777).toBe(0o600);
  const mask = process.umask(0);
  const lax = await open(join(folder, 'lax'));
  expect(statSync(join(folder, 'lax')).mode & 0o777).toBe(0o600);
  expect(process.umask(mask)).toBe(0);
  const { socket } = await connected();
  const before = process.listenerCount('exit'); // one for all
  lax.close(new Error('over'));
  guest.host.close(new Error('over'));
  expect(process.listenerCount('exit')).toBe(before - 1);
  expect([existsSync(path), existsSync(join(folder, 'lax'))]).toEqual([false, false]);
  guest.channel.destroy();
  expect(await ended(socket)).toHaveLength(0);
});

test('one that a dead process left is replaced; a live one and other files are not', async () => {
  await expect(open(path)).rejects.toMatchObject({ code: 'ERR_OUTPUT', message: /another process listens on it/ });
  const stale = join(folder, 'stale');
  const leave = `require('net').createServer().listen(${JSON.stringify(stale)}, () => process.kill(process.pid, 9))`;
  expect(() => execFileSync(process.execPath, ['-e', leave], { stdio: 'ignore' })).toThrow();
  expect(existsSync(stale)).toBe(true);
  (await open(stale)).close(new Error('over'));
  const file = join(folder, 'file');
  writeFileSync(file, 'precious');
  await expect(open(file)).rejects.toThrow(/vsock\.socket: cannot make .*file: there is a file of that name/);
  expect(existsSync(file)).toBe(true);
  await expect(open(join(folder, 'missing', 'x'))).rejects.toThrow(/there is no folder/);
  await expect(open(join(folder, 'x'.repeat(100)))).rejects.toThrow(/longer than 107 bytes/);
  if (process.getuid?.() === 0) return; // may write everywhere
  mkdirSync(join(folder, 'read-only'));
  chmodSync(join(folder, 'read-only'), 0o500);
  await expect(open(join(folder, 'read-only', 'x'))).rejects.toThrow(/EACCES/);
});
