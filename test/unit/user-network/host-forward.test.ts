import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { expect, test } from 'vitest';
import { type HostForward, parseHostForward, UserNetwork } from '#dist/backends/user-network/user-network.js';
import { Guest } from './guest.js';
import type { GuestConnection } from './guest-tcp.js';
import { GATEWAY, GUEST } from './packets.js';
import { distinct, eventually, HostServer, readAll } from './support.js';

const HTTP: HostForward = { protocol: 'tcp', hostAddress: '127.0.0.1', hostPort: 0, guestPort: 80 };
const DNS: HostForward = { protocol: 'udp', hostAddress: '127.0.0.1', hostPort: 0, guestPort: 53 };

async function dial(network: UserNetwork, index = 0): Promise<Socket> {
  const port = network.hostForwards[index]?.hostPort as number;
  const socket = connect({ port, host: '127.0.0.1', allowHalfOpen: true });
  socket.on('error', () => {});
  await once(socket, 'connect');
  return socket;
}

test('QEMU’s syntax', () => {
  const parsed: [string, HostForward][] = [
    ['tcp:127.0.0.1:8080-:80', { protocol: 'tcp', hostAddress: '127.0.0.1', hostPort: 8080, guestPort: 80 }],
    ['tcp::8080-:80', { protocol: 'tcp', hostAddress: '127.0.0.1', hostPort: 8080, guestPort: 80 }],
    ['tcp:0.0.0.0:0-:22', { protocol: 'tcp', hostAddress: '0.0.0.0', hostPort: 0, guestPort: 22 }],
    [
      'udp:127.0.0.1:5353-10.0.2.15:53',
      { protocol: 'udp', hostAddress: '127.0.0.1', hostPort: 5353, guestAddress: '10.0.2.15', guestPort: 53 },
    ],
  ];
  for (const [text, forward] of parsed) expect(parseHostForward(text)).toEqual(forward);
});

test.each([
  ['', 'is not tcp|udp:'],
  ['8080:80', 'is not tcp|udp:'],
  ['sctp::8080-:80', 'is not tcp|udp:'],
  ['tcp::8080', 'is not tcp|udp:'],
  ['tcp:8080-:80', 'is not tcp|udp:'],
  ['tcp::8080-80', 'is not tcp|udp:'],
  ['tcp::http-:80', "'http' is not a port number"],
  ['tcp::8080-:8e1', "'8e1' is not a port number"],
  ['tcp::65536-:80', 'host port 65536 is not between 0 and 65535'],
  ['tcp::8080-:0', 'guest port 0 is not between 1 and 65535'],
  ['tcp:localhost:8080-:80', "'localhost' is not an IPv4 address"],
  ['tcp:127.0.0.256:8080-:80', "'127.0.0.256' is not an IPv4 address"],
  ['tcp::8080-10.0.3.15:80', "guest address '10.0.3.15' is not one of a guest"],
  ['tcp::8080-10.0.2.2:80', "guest address '10.0.2.2' is not one of a guest"],
])('%s is a usage error', (text, message) => {
  expect(() => parseHostForward(text)).toThrow(
    expect.objectContaining({ code: 'ERR_USAGE', message: expect.stringContaining(message) }),
  );
  expect(() => parseHostForward(text)).toThrow(`host forward '${text}'`);
});

test('data both ways over a TCP forward, and both ends', async () => {
  await using guest = await Guest.open({ hostForwards: [HTTP], tuning: { timeWait: 10 } });
  guest.announce();
  const accepted = new Promise<GuestConnection>((resolve) => guest.tcp.listen(80, resolve));
  const socket = await dial(guest.network);
  const connection = await accepted;
  expect(connection.remote).toBe(GATEWAY);
  expect(connection.remotePort).toBeGreaterThanOrEqual(49152);
  expect([connection.peerMss, connection.peerScale]).toEqual([1460, 3]);
  const [up, down] = [distinct(2_000_001), distinct(2_000_003)];
  connection.write(up);
  connection.end();
  socket.end(down);
  expect((await readAll(socket)).equals(up)).toBe(true);
  await connection.until((c) => c.ended && c.finAcked);
  expect(connection.data.equals(down)).toBe(true);
  await eventually(() => guest.network.counters.tcpNow === 0);
  expect(guest.faults).toEqual([]);
});

test('many connections at once are kept apart', async () => {
  await using guest = await Guest.open({ hostForwards: [HTTP] });
  guest.announce();
  guest.tcp.listen(80, (connection) => {
    void connection
      .until((c) => c.received === 4)
      .then((c) => {
        c.write(Buffer.concat([Buffer.from('you said '), c.data]));
        c.end();
      });
  });
  const answers = Array.from({ length: 50 }, async (_, i) => {
    const socket = await dial(guest.network);
    socket.write(String(1000 + i));
    return (await readAll(socket)).toString();
  });
  expect(await Promise.all(answers)).toEqual(Array.from({ length: 50 }, (_, i) => `you said ${1000 + i}`));
});

test('a port on which the guest does not listen resets the host’s connection', async () => {
  await using guest = await Guest.open({ hostForwards: [HTTP] });
  guest.announce();
  const socket = await dial(guest.network);
  await expect(once(socket.resume(), 'close')).rejects.toMatchObject({ code: 'ECONNRESET' });
  expect(guest.network.counters.tcpNow).toBe(0);
});

test('a connection waits for a guest that is not there yet: it is asked for its MAC', async () => {
  await using guest = await Guest.open({ hostForwards: [HTTP], tuning: { firstTimeout: 20 } });
  const accepted = new Promise<GuestConnection>((resolve) => guest.tcp.listen(80, resolve));
  const socket = await dial(guest.network);
  const question = await guest.next((frame) => frame.type === 0x0806);
  expect(question.payload.subarray(24, 28)).toEqual(Buffer.from([10, 0, 2, 15]));
  expect(question.payload.readUInt16BE(6)).toBe(1);
  guest.announce();
  const connection = await accepted;
  connection.write(Buffer.from('at last'));
  connection.end();
  expect((await readAll(socket)).toString()).toBe('at last');
});

test('a peer that gives up first is no trouble', async () => {
  await using guest = await Guest.open({ hostForwards: [HTTP] });
  const socket = await dial(guest.network);
  socket.resetAndDestroy();
  guest.announce();
  await guest.settle();
});

test('UDP forwards: each peer is a port of the gateway', async () => {
  await using guest = await Guest.open({ hostForwards: [HTTP, DNS], tuning: { sweep: 20, udpIdle: 60_000 } });
  guest.announce();
  await guest.settle();
  const port = guest.network.hostForwards[1]?.hostPort as number;
  const peers = [createSocket('udp4'), createSocket('udp4')];
  const ports: number[] = [];
  for (const [i, peer] of peers.entries()) {
    for (const text of [`first ${i}`, `second ${i}`]) {
      peer.send(text, port, '127.0.0.1');
      const { source, sourcePort, payload } = await guest.nextUdp(53);
      expect([source, payload.toString()]).toEqual([GATEWAY, text]);
      ports.push(sourcePort);
    }
  }
  expect(ports[0]).toBe(ports[1]);
  expect(ports[2]).toBe(ports[3]);
  expect(ports[0]).not.toBe(ports[2]);
  for (const [i, peer] of peers.entries()) {
    const answer = once(peer, 'message');
    guest.sendUdp(GATEWAY, ports[2 * i] as number, 53, `answer ${i}`);
    const [payload, from] = await answer;
    expect([String(payload), from.port]).toEqual([`answer ${i}`, port]);
    peer.close();
  }
  expect(guest.network.counters.udpMappingsNow).toBe(0);
  expect(guest.faults).toEqual([]);
});

test('UDP peers beyond the limit displace the oldest', async () => {
  await using guest = await Guest.open({ hostForwards: [DNS], tuning: { forwardPeers: 2 } });
  guest.announce();
  await guest.settle();
  const port = guest.network.hostForwards[0]?.hostPort as number;
  const peers = [createSocket('udp4'), createSocket('udp4'), createSocket('udp4')];
  const ports: number[] = [];
  for (const i of [0, 1, 0, 2, 0, 1]) {
    peers[i]?.send('x', port, '127.0.0.1');
    ports.push((await guest.nextUdp(53)).sourcePort);
  }
  expect(ports[4]).toBe(ports[0]);
  expect(ports[5]).not.toBe(ports[1]);
  for (const peer of peers) peer.close();
});

test('a port that is taken is named, and the ports bound before it are free again', async () => {
  await using host = await HostServer.open();
  const free = await UserNetwork.open({ hostForwards: [HTTP, DNS] });
  const [tcp, udp] = free.hostForwards.map((forward) => forward.hostPort) as [number, number];
  await free.close();
  const hostForwards = [
    { ...HTTP, hostPort: tcp },
    { ...DNS, hostPort: udp },
    { ...HTTP, hostPort: host.port },
  ];
  await expect(UserNetwork.open({ hostForwards })).rejects.toMatchObject({
    code: 'ERR_NETWORK',
    message: `host forward 'tcp:127.0.0.1:${host.port}-:80': port ${host.port} of 127.0.0.1 is in use; choose another, or 0 for any`,
  });
  await using again = await UserNetwork.open({ hostForwards: hostForwards.slice(0, 2) });
  expect(again.hostForwards).toEqual(hostForwards.slice(0, 2));
  await expect(UserNetwork.open({ hostForwards: [{ ...DNS, hostPort: udp }] })).rejects.toMatchObject({
    code: 'ERR_NETWORK',
  });
});

test('an address that is not the host’s, and options that are wrong', async () => {
  await expect(UserNetwork.open({ hostForwards: [{ ...HTTP, hostAddress: '192.0.2.1' }] })).rejects.toMatchObject({
    code: 'ERR_NETWORK',
    message: expect.stringContaining('192.0.2.1 is not an address of this host'),
  });
  for (const wrong of [{ hostPort: 1.5 }, { hostAddress: '::1' }, { guestPort: 0 }, { guestAddress: 'x' }]) {
    await expect(UserNetwork.open({ hostForwards: [{ ...HTTP, ...wrong }] })).rejects.toMatchObject({
      code: 'ERR_USAGE',
    });
  }
});

test('a forward to another address of the guest', async () => {
  await using guest = await Guest.open({ hostForwards: [{ ...DNS, guestAddress: '10.0.2.99' }] });
  guest.announce();
  await guest.settle();
  const peer = createSocket('udp4');
  peer.send('x', guest.network.hostForwards[0]?.hostPort as number, '127.0.0.1');
  const datagram = await guest.nextDatagram((d) => d.protocol === 17);
  expect(datagram.destination).toBe('10.0.2.99');
  expect(datagram.destination).not.toBe(GUEST);
  peer.close();
});
