import { createSocket, type RemoteInfo, type Socket } from 'node:dgram';
import { once } from 'node:events';
import { setTimeout } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { Random } from '../../kvm/assist/random.js';
import { Guest } from './guest.js';
import { GATEWAY, GUEST, ipv4, udpPayload } from './packets.js';
import { distinct, eventually } from './support.js';

/** A UDP socket of the host on loopback. */
class HostSocket implements AsyncDisposable {
  readonly socket: Socket;
  readonly received: { payload: Buffer; from: RemoteInfo }[] = [];
  #changed: (() => void)[] = [];

  static async open(echo = false): Promise<HostSocket> {
    const host = new HostSocket(echo);
    host.socket.bind(0, '127.0.0.1');
    await once(host.socket, 'listening');
    return host;
  }

  private constructor(echo: boolean) {
    this.socket = createSocket('udp4');
    this.socket.on('message', (payload, from) => {
      this.received.push({ payload, from });
      if (echo) this.socket.send(payload, from.port, from.address);
      for (const changed of this.#changed.splice(0)) changed();
    });
  }

  get port(): number {
    return this.socket.address().port;
  }

  async next(): Promise<{ payload: Buffer; from: RemoteInfo }> {
    while (this.received.length === 0) await new Promise<void>((resolve) => this.#changed.push(resolve));
    return this.received.shift() as { payload: Buffer; from: RemoteInfo };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await new Promise<void>((resolve) => this.socket.close(() => resolve()));
  }
}

test.each([0, 1, 3])('echo through the host’s loopback, offloads %i', async (offloads) => {
  await using host = await HostSocket.open(true);
  await using guest = await Guest.open();
  guest.setOffloads(offloads);
  for (const size of [0, 1, 2, 100, 1471, 1472, 1473, 2960, 2961, 8000, 65_507]) {
    const payload = distinct(size);
    sendUdp(guest, host.port, 4000, payload);
    const answer = await guest.nextUdp(4000);
    expect([answer.source, answer.sourcePort]).toEqual([GATEWAY, host.port]);
    expect(answer.payload.equals(payload)).toBe(true);
  }
  expect(guest.faults).toEqual([]);
  expect(guest.network.counters.udpMappingsNow).toBe(1);
});

let nextId = 1;

/** Sends a datagram in fragments if it is above the MTU, in the order that `order` makes of them. */
function sendUdp(guest: Guest, port: number, from: number, payload: Uint8Array, order = (all: Buffer[]) => all): void {
  const whole = udpPayload(GATEWAY, port, from, payload);
  const id = nextId++;
  const pieces: Buffer[] = [];
  for (let at = 0; at < whole.length; at += 1480) {
    const more = at + 1480 < whole.length ? 0x2000 : 0;
    pieces.push(ipv4(GATEWAY, 17, whole.subarray(at, at + 1480), { id, fragment: more | (at >> 3) }));
  }
  for (const piece of order(pieces)) guest.send(piece);
}

test('a checksum of zero is sent as its other form, since zero means none', async () => {
  await using host = await HostSocket.open(true);
  await using guest = await Guest.open();
  // Two bytes that make the sum of the answer all ones.
  const answer = udpPayload(GUEST, 4000, host.port, Buffer.alloc(2), GATEWAY);
  sendUdp(guest, host.port, 4000, answer.subarray(6, 8));
  const datagram = await guest.nextDatagram((d) => d.protocol === 17);
  expect(datagram.payload.readUInt16BE(6)).toBe(0xffff);
  expect(guest.faults).toEqual([]);
});

test('fragments come in any order', async () => {
  const random = new Random();
  await using host = await HostSocket.open();
  await using guest = await Guest.open();
  for (let i = 0; i < 20; i++) {
    const payload = distinct(3000 + 3000 * i);
    sendUdp(guest, host.port, 4000, payload, (all) => {
      const left = [...all];
      return all.map(() => left.splice(random.below(left.length), 1)[0] as Buffer);
    });
    expect((await host.next()).payload.equals(payload), `TSVISOR_SEED=${random.seed}`).toBe(true);
  }
  expect(guest.network.counters.dropped.fragment).toBe(0);
});

test('fragments that overlap, repeat or do not fit drop their datagram', async () => {
  await using host = await HostSocket.open();
  await using guest = await Guest.open({ tuning: { reassemblies: 2 } });
  const { dropped } = guest.network.counters;
  const fragment = (id: number, offset: number, length: number, more: boolean) =>
    guest.send(ipv4(GATEWAY, 17, Buffer.alloc(length), { id, fragment: (more ? 0x2000 : 0) | (offset / 8) }));
  const cases: [number, number, boolean][][] = [
    [
      [0, 80, true],
      [0, 80, true],
    ], // the same again
    [
      [0, 80, true],
      [72, 80, false],
    ], // overlap
    [
      [80, 80, true],
      [0, 88, true],
    ],
    [[0, 81, true]], // not a multiple of eight
    [[0, 0, true]],
    [[65_528, 80, false]], // above 64 KiB
    [
      [80, 80, false],
      [160, 8, false],
    ], // two ends
    [
      [160, 80, true],
      [80, 8, false],
    ], // data behind the end
  ];
  for (const [i, pieces] of cases.entries()) {
    for (const [offset, length, more] of pieces) fragment(1000 + i, offset, length, more);
    await guest.settle();
    expect(dropped.fragment, `case ${i}`).toBe(i + 1);
  }
  // The oldest of too many gives way.
  for (let id = 1; id <= 3; id++) fragment(id, 0, 8, true);
  await guest.settle();
  expect(dropped.fragment).toBe(cases.length + 1);
  expect(host.received).toEqual([]);
});

test('fragments that wait too long are dropped', async () => {
  await using guest = await Guest.open({ tuning: { sweep: 10, reassemblyTimeout: 20 } });
  guest.send(ipv4(GATEWAY, 17, Buffer.alloc(80), { id: 1, fragment: 0x2000 }));
  await eventually(() => guest.network.counters.dropped.fragment === 1);
});

test('a guest port is one host port to all peers, and only those it wrote to may answer', async () => {
  await using one = await HostSocket.open();
  await using two = await HostSocket.open();
  await using guest = await Guest.open();
  guest.sendUdp(GATEWAY, one.port, 5000, 'a');
  guest.sendUdp(GATEWAY, two.port, 5000, 'b');
  guest.sendUdp(GATEWAY, two.port, 5001, 'c');
  const { port } = (await one.next()).from;
  expect((await two.next()).from.port).toBe(port);
  expect((await two.next()).from.port).not.toBe(port);
  // Another port of an address that the guest knows, as TFTP does.
  two.socket.send('hello', port, '127.0.0.1');
  expect(await guest.nextUdp(5000)).toMatchObject({
    source: GATEWAY,
    sourcePort: two.port,
    payload: Buffer.from('hello'),
  });
  expect(guest.network.counters.udpMappingsNow).toBe(2);
});

test('a peer whose flow was forgotten is a stranger', async () => {
  await using host = await HostSocket.open();
  const allow = ({ port }: { port: number }) => port === host.port;
  await using guest = await Guest.open({ allow, tuning: { udpFlows: 2 } });
  guest.sendUdp(GATEWAY, host.port, 5000, 'a');
  const { port } = (await host.next()).from;
  for (const other of [1, 2]) guest.sendUdp('192.0.2.1', other, 5000, 'refused');
  await guest.settle();
  host.socket.send('from a stranger', port, '127.0.0.1');
  await setTimeout(50);
  guest.sendUdp(GATEWAY, host.port, 5000, 'b');
  await host.next();
  host.socket.send('from a friend', port, '127.0.0.1');
  expect((await guest.nextUdp(5000)).payload.toString()).toBe('from a friend');
});

test('mappings that are idle close, and the least recently used gives way', async () => {
  await using host = await HostSocket.open();
  await using guest = await Guest.open({ tuning: { udpMappings: 3, sweep: 20, udpIdle: 300 } });
  const { counters } = guest.network;
  const ports: number[] = [];
  for (const from of [1, 2, 3, 1, 4, 1, 2]) {
    guest.sendUdp(GATEWAY, host.port, 6000 + from, 'x');
    ports.push((await host.next()).from.port);
  }
  expect(counters.udpMappingsNow).toBe(3);
  expect(ports[3]).toBe(ports[0]);
  expect(ports[5]).toBe(ports[0]); // 2 gave way to 4, not 1
  expect(ports[6]).not.toBe(ports[1]);
  await eventually(() => counters.udpMappingsNow === 0);
});

test('flows of one port are limited', async () => {
  const asked: number[] = [];
  await using host = await HostSocket.open();
  const allow = ({ port }: { port: number }) => {
    asked.push(port);
    return port === host.port;
  };
  await using guest = await Guest.open({ allow, tuning: { udpFlows: 4 } });
  for (let port = 1; port <= 10; port++) guest.sendUdp('192.0.2.1', port, 5000, 'x');
  guest.sendUdp('192.0.2.1', 10, 5000, 'known');
  guest.sendUdp('192.0.2.1', 1, 5000, 'forgotten');
  guest.sendUdp(GATEWAY, host.port, 5000, 'y');
  expect((await host.next()).payload.toString()).toBe('y');
  expect(asked).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, host.port]);
  expect(guest.network.counters.refused).toBe(11);
});

test('what waits for a decision is bounded', async () => {
  let decide = (_allowed: boolean) => {};
  const allow = () => new Promise<boolean>((resolve) => (decide = resolve));
  await using host = await HostSocket.open();
  await using guest = await Guest.open({ allow, tuning: { udpPending: 10_000 } });
  for (let i = 0; i < 20; i++) guest.sendUdp(GATEWAY, host.port, 5000, Buffer.alloc(1000, i));
  await guest.settle();
  expect(guest.network.counters.dropped.limit).toBe(11);
  decide(true);
  for (let i = 0; i < 9; i++) expect((await host.next()).payload[0]).toBe(i);
});

test('a source address other than the DHCP one works too', async () => {
  await using host = await HostSocket.open(true);
  await using guest = await Guest.open();
  const payload = udpPayload(GATEWAY, host.port, 7000, Buffer.from('x'), '10.0.2.40');
  guest.send(ipv4(GATEWAY, 17, payload, { source: '10.0.2.40' }));
  const answer = await guest.nextDatagram((d) => d.protocol === 17);
  expect([answer.destination, answer.source]).toEqual(['10.0.2.40', GATEWAY]);
  guest.sendUdp(GATEWAY, host.port, 7000, 'y');
  expect((await guest.nextDatagram((d) => d.protocol === 17)).destination).toBe(GUEST);
  expect(guest.network.counters.udpMappingsNow).toBe(2);
});
