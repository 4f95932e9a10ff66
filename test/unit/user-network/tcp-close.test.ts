import { once } from 'node:events';
import type { Socket } from 'node:net';
import { setTimeout } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { Guest } from './guest.js';
import type { GuestConnection } from './guest-tcp.js';
import { ACK, DNS, FIN, GATEWAY, GUEST, parseIpv4, parseTcp, RST, SYN, type TcpFields, tcp } from './packets.js';
import { distinct, eventually, HostServer, readAll } from './support.js';

async function connected(host: HostServer, guest: Guest): Promise<[GuestConnection, Socket]> {
  const connection = await guest.tcp.connect(host.port);
  return [connection, await host.next()];
}

test('the guest ends first and the host goes on sending', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { timeWait: 50 } });
  const [connection, socket] = await connected(host, guest);
  connection.write(Buffer.from('request'));
  connection.end();
  expect((await readAll(socket)).toString()).toBe('request');
  await connection.until((c) => c.finAcked);
  const answer = distinct(300_000);
  socket.write(answer);
  await connection.until((c) => c.received === answer.length);
  expect(connection.ended).toBe(false);
  socket.end('more');
  await connection.until((c) => c.ended);
  expect(connection.data.equals(Buffer.concat([answer, Buffer.from('more')]))).toBe(true);
  await eventually(() => guest.network.counters.tcpNow === 0);
  expect(guest.network.counters.tcpBufferedNow).toBe(0);
});

test('the host ends first and the guest goes on sending', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { timeWait: 50 } });
  const [connection, socket] = await connected(host, guest);
  socket.end('greeting');
  await connection.until((c) => c.ended);
  const data = distinct(300_000);
  const read = readAll(socket);
  connection.write(data);
  await connection.until((c) => c.unacknowledged === 0);
  expect(guest.network.counters.tcpNow).toBe(1);
  connection.write(Buffer.from('more'));
  connection.end();
  expect((await read).equals(Buffer.concat([data, Buffer.from('more')]))).toBe(true);
  await connection.until((c) => c.finAcked);
  await eventually(() => guest.network.counters.tcpNow === 0); // after TIME_WAIT
});

test('both end at once', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { timeWait: 50 } });
  const [connection, socket] = await connected(host, guest);
  connection.end();
  socket.end();
  socket.resume();
  await connection.until((c) => c.ended && c.finAcked);
  await eventually(() => guest.network.counters.tcpNow === 0);
});

test('a reset of the guest resets the host’s peer', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const [connection, socket] = await connected(host, guest);
  socket.resume();
  const failed = once(socket, 'error');
  connection.reset();
  await expect(failed).resolves.toMatchObject([{ code: 'ECONNRESET' }]);
  expect(guest.network.counters.tcpNow).toBe(0);
});

test('a reset of the host’s peer resets the guest', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const [connection, socket] = await connected(host, guest);
  socket.resetAndDestroy();
  await connection.until((c) => c.state === 'reset');
  expect(guest.network.counters.tcpNow).toBe(0);
});

test('what the guest sent before it ended arrives although the host reads late', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const [connection, socket] = await connected(host, guest);
  const data = distinct(4 * 1024 * 1024);
  socket.end();
  connection.write(data);
  connection.end();
  await connection.until((c) => c.unacknowledged < 3 * 1024 * 1024);
  expect((await readAll(socket)).equals(data)).toBe(true);
});

test('the device going away resets the host’s peers', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const [, socket] = await connected(host, guest);
  socket.resume();
  const failed = once(socket, 'error');
  guest.socket.destroy();
  await expect(failed).resolves.toMatchObject([{ code: 'ECONNRESET' }]);
});

/** Segments by hand. */
class RawPeer {
  readonly guest: Guest;
  readonly port: number;
  readonly destinationPort: number;
  constructor(guest: Guest, destinationPort: number, port = 1234) {
    this.guest = guest;
    this.port = port;
    this.destinationPort = destinationPort;
    guest.rawTcp = true;
  }

  send(fields: Partial<TcpFields>, destination = GATEWAY): void {
    const { port: sourcePort, destinationPort } = this;
    this.guest.send(tcp(destination, { sourcePort, destinationPort, sequence: 0, flags: ACK, ...fields }));
  }

  async next() {
    return parseTcp(await this.guest.nextDatagram((d) => d.protocol === 6));
  }

  /** @returns the first sequence number of the network, and the guest's next. */
  async open(sequence: number): Promise<{ theirs: number; ours: number }> {
    this.send({ sequence, flags: SYN });
    const answer = await this.next();
    expect(answer.flags).toBe(SYN | ACK);
    expect(answer.acknowledgement).toBe((sequence + 1) >>> 0);
    const [theirs, ours] = [(answer.sequence + 1) >>> 0, (sequence + 1) >>> 0];
    this.send({ sequence: ours, acknowledgement: theirs });
    return { theirs, ours };
  }

  async silence(): Promise<void> {
    await this.guest.settle();
    expect(this.guest.taken((frame) => frame.type === 0x0800).map((f) => parseTcp(parseIpv4(f)).flags)).toEqual([]);
  }
}

test('segments of no connection are reset, resets are not', async () => {
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, 80);
  peer.send({ sequence: 1000, acknowledgement: 77, flags: ACK, payload: Buffer.from('abc') });
  expect(await peer.next()).toMatchObject({ flags: RST, sequence: 77, sourcePort: 80, destinationPort: 1234 });
  peer.send({ sequence: 1000, flags: FIN, payload: Buffer.from('abc') });
  expect(await peer.next()).toMatchObject({ flags: RST | ACK, sequence: 0, acknowledgement: 1004 });
  peer.send({ sequence: 1000, flags: RST });
  await peer.silence();
});

test('the MSS and window scale options are as asked for', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const scaled = await guest.tcp.connect(host.port, { mss: 1000 });
  expect([scaled.peerMss, scaled.peerScale]).toEqual([1460, 3]);
  const plain = await guest.tcp.connect(host.port, { windowScale: -1 });
  expect([plain.peerMss, plain.peerScale]).toEqual([1460, -1]);
  (await host.next()).end(distinct(100_000));
  const longest: number[] = [];
  const input = guest.tcp.input.bind(guest.tcp);
  guest.tcp.input = (segment) => {
    longest.push(segment.payload.length);
    input(segment);
  };
  await scaled.until((c) => c.ended);
  expect(Math.max(...longest)).toBe(1000);
});

test('a repeated SYN is answered again, and one in the middle is challenged', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, host.port);
  peer.send({ sequence: 0xffff_ffff, flags: SYN });
  const first = await peer.next();
  peer.send({ sequence: 0xffff_ffff, flags: SYN });
  const second = await peer.next();
  expect([second.sequence, second.flags, second.acknowledgement]).toEqual([first.sequence, SYN | ACK, 0]);
  peer.send({ sequence: 0, acknowledgement: first.sequence + 1 });
  await peer.silence();
  peer.send({ sequence: 100, flags: SYN });
  expect(await peer.next()).toMatchObject({ flags: ACK, acknowledgement: 0 });
});

test('an acknowledgement of something never sent opens nothing', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, host.port);
  peer.send({ sequence: 1, flags: SYN });
  const answer = await peer.next();
  peer.send({ sequence: 2, acknowledgement: answer.sequence + 2 });
  expect(await peer.next()).toMatchObject({ flags: RST, sequence: (answer.sequence + 2) >>> 0 });
  expect(guest.network.counters.tcpOpened).toBe(0);
});

test('a host that ends before the guest’s side is open is heard', async () => {
  await using host = await HostServer.open((socket) => socket.resume().end());
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, host.port);
  peer.send({ sequence: 1, flags: SYN });
  const answer = await peer.next();
  await setTimeout(50); // for the end to arrive
  peer.send({ sequence: 2, acknowledgement: answer.sequence + 1 });
  expect(await peer.next()).toMatchObject({ flags: FIN | ACK, sequence: (answer.sequence + 1) >>> 0 });
});

test('a reset that only guesses the sequence number gets a challenge', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, host.port);
  const { theirs, ours } = await peer.open(5000);
  peer.send({ sequence: ours + 10, flags: RST });
  expect(await peer.next()).toMatchObject({ flags: ACK, sequence: theirs, acknowledgement: ours });
  peer.send({ sequence: ours + 10_000_000, flags: RST });
  await peer.silence();
  expect(guest.network.counters.tcpNow).toBe(1);
  peer.send({ sequence: ours, flags: RST });
  await peer.silence();
  expect(guest.network.counters.tcpNow).toBe(0);
});

test('data with an acknowledgement of something never sent is not taken', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, host.port);
  const { theirs, ours } = await peer.open(5000);
  const socket = await host.next();
  peer.send({ sequence: ours, acknowledgement: theirs + 1, payload: Buffer.from('wrong') });
  expect(await peer.next()).toMatchObject({ flags: ACK, sequence: theirs, acknowledgement: ours });
  peer.send({ sequence: ours, acknowledgement: theirs, flags: ACK | FIN, payload: Buffer.from('right') });
  expect((await readAll(socket)).toString()).toBe('right');
});

test('overlapping, repeated and premature data is put right', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, host.port);
  const { theirs, ours } = await peer.open(0xffff_fffa);
  const socket = await host.next();
  const send = (offset: number, text: string, flags = ACK) =>
    peer.send({ sequence: ours + offset, acknowledgement: theirs, flags, payload: Buffer.from(text) });
  send(3, 'defg');
  expect(await peer.next()).toMatchObject({ acknowledgement: ours }); // what it waits for
  send(0, 'abcd');
  send(0, 'abcd');
  send(2, 'cdefgh');
  send(6, 'ghij', ACK | FIN);
  expect((await readAll(socket)).toString()).toBe('abcdefghij');
  for (;;) {
    const { acknowledgement } = await peer.next();
    if (acknowledgement === (ours + 11) >>> 0) break; // the FIN counts, and the numbers have wrapped
  }
  expect(guest.faults).toEqual([]);
});

test('TIME_WAIT answers a repeated FIN and gives way to a new connection', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { timeWait: 60_000 } });
  const peer = new RawPeer(guest, host.port);
  const { theirs, ours } = await peer.open(7000);
  const socket = await host.next();
  socket.resume();
  socket.end();
  expect(await peer.next()).toMatchObject({ flags: FIN | ACK, sequence: theirs });
  const fin = { sequence: ours, acknowledgement: theirs + 1, flags: FIN | ACK };
  for (let i = 0; i < 2; i++) {
    peer.send(fin);
    expect(await peer.next()).toMatchObject({ flags: ACK, acknowledgement: ours + 1 });
  }
  expect(guest.network.counters.tcpNow).toBe(1);
  await peer.open(9000);
  expect((await host.next()).destroyed).toBe(false);
  expect(guest.network.counters.tcpNow).toBe(1);
});

test('the connection closes without TIME_WAIT when the guest ends first', async () => {
  await using host = await HostServer.open();
  await using guest = await Guest.open({ tuning: { timeWait: 60_000 } });
  const peer = new RawPeer(guest, host.port);
  const { theirs, ours } = await peer.open(1);
  const socket = await host.next();
  peer.send({ sequence: ours, acknowledgement: theirs, flags: FIN | ACK });
  expect(await peer.next()).toMatchObject({ flags: ACK, acknowledgement: ours + 1 });
  socket.resume();
  socket.end();
  expect(await peer.next()).toMatchObject({ flags: FIN | ACK, sequence: theirs });
  peer.send({ sequence: ours + 1, acknowledgement: theirs + 1 });
  await eventually(() => guest.network.counters.tcpNow === 0);
});

test('what cannot be reached is told by ICMP about that very SYN', async () => {
  await using guest = await Guest.open();
  const peer = new RawPeer(guest, 80);
  peer.send({ sequence: 0x1234_5678, flags: SYN }, '10.0.2.99');
  const message = await guest.nextDatagram((d) => d.protocol === 1);
  expect(message.source).toBe(GATEWAY);
  expect([...message.payload.subarray(0, 2)]).toEqual([3, 1]);
  const quoted = parseIpv4({ ...message.frame, payload: quotedPacket(message.payload) });
  expect([quoted.source, quoted.destination, quoted.protocol]).toEqual([GUEST, '10.0.2.99', 6]);
  expect(quoted.payload).toEqual(Buffer.from([1234 >> 8, 1234 & 255, 0, 80, 0x12, 0x34, 0x56, 0x78]));
  peer.send({ sequence: 1, flags: SYN }, DNS);
  expect(await peer.next()).toMatchObject({ flags: RST | ACK, acknowledgement: 2 });
  expect(guest.network.counters.tcpNow).toBe(0);
});

/** The packet in an ICMP message, with a TTL as if it had not been on its way. */
function quotedPacket(message: Buffer): Buffer {
  const packet = Buffer.from(message.subarray(8));
  packet.writeUInt16BE(packet.readUInt16BE(10) - ((64 - (packet[8] as number)) << 8), 10);
  packet[8] = 64;
  return packet;
}
