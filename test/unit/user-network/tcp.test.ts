import { once } from 'node:events';
import { createServer } from 'node:net';
import { expect, test } from 'vitest';
import { Guest } from './guest.js';
import { distinct, HostServer, readAll } from './support.js';

const MIB = 1024 * 1024;

test.each([
  ['complete checksums', 0],
  ['partial checksums', 1],
  ['large segments', 3],
])('data both ways over several MiB, %s', async (_name, offloads) => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  guest.setOffloads(offloads);
  const connection = await guest.tcp.connect(host.port, { largeSegments: offloads === 3 ? 60_000 : 0 });
  const socket = await host.next();
  const [up, down] = [distinct(5 * MIB + 3), distinct(5 * MIB + 1)];
  connection.write(up);
  connection.end();
  socket.end(down);
  expect((await readAll(socket)).equals(up)).toBe(true);
  await connection.until((c) => c.ended && c.finAcked);
  expect(connection.data.equals(down)).toBe(true);
  expect(guest.faults).toEqual([]);
  if (offloads === 3) {
    expect(guest.largestFrame).toBeGreaterThan(60_000);
    expect(connection.segments).toBeLessThan(500);
  } else {
    expect(guest.largestFrame).toBeLessThanOrEqual(12 + 14 + 1500);
  }
  expect(guest.network.counters.tcpRetransmissions).toBe(0);
});

test('a connection that the host refuses is reset', async () => {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as { port: number };
  server.close();
  await once(server, 'close');
  await using guest = await Guest.open();
  const connection = await guest.tcp.connect(port);
  expect(connection.state).toBe('reset');
  expect(guest.faults).toEqual([]);
});
