import { describe, expect, test } from 'vitest';
import { Guest } from './guest.js';
import {
  arp,
  BROADCAST_MAC,
  checksum,
  DNS,
  ethernet,
  GATEWAY,
  GUEST,
  GUEST_MAC,
  icmpEcho,
  ip,
  ipv4,
  udp,
} from './packets.js';

const UDP = Buffer.from('hello');

async function ask(guest: Guest, sender: string, target: string, operation = 1) {
  guest.sendFrame(ethernet(0x0806, arp(operation, sender, target), BROADCAST_MAC));
  await guest.settle();
  return guest.taken((frame) => frame.type === 0x0806);
}

describe('ARP', () => {
  test('answers for the network’s addresses and for those that nobody has', async () => {
    await using guest = await Guest.open();
    for (const address of [GATEWAY, DNS, '10.0.2.77']) {
      const [reply] = await ask(guest, GUEST, address);
      expect(reply?.destinationMac).toEqual(GUEST_MAC);
      expect(reply?.payload).toEqual(
        Buffer.concat([
          Buffer.from([0, 1, 8, 0, 6, 4, 0, 2]),
          Buffer.from('52550a000202', 'hex'),
          ip(address),
          GUEST_MAC,
          ip(GUEST),
        ]),
      );
    }
    expect(guest.faults).toEqual([]);
  });

  test('does not answer for the guest’s addresses, announcements, probes or other networks', async () => {
    await using guest = await Guest.open();
    expect(await ask(guest, GUEST, GUEST)).toEqual([]);
    expect(await ask(guest, '0.0.0.0', GUEST)).toEqual([]);
    expect(await ask(guest, '0.0.0.0', '10.0.2.77')).toEqual([]);
    expect(await ask(guest, GUEST, '10.0.3.1')).toEqual([]);
    expect(await ask(guest, GUEST, GATEWAY, 2)).toEqual([]);
    // The guest takes another address: nobody else has it from then on.
    expect(await ask(guest, '10.0.2.77', '10.0.2.77')).toEqual([]);
    expect(await ask(guest, GUEST, '10.0.2.77')).toEqual([]);
    // But a probe for an address of the network is told that it is taken.
    expect(await ask(guest, '0.0.0.0', GATEWAY)).toHaveLength(1);
  });

  test('drops what is malformed and what pretends to be the network', async () => {
    await using guest = await Guest.open();
    const { dropped } = guest.network.counters;
    expect(await ask(guest, GATEWAY, DNS)).toEqual([]);
    expect(dropped.spoofed).toBe(1);
    const bad = arp(1, GUEST, GATEWAY);
    bad[4] = 8;
    guest.sendFrame(ethernet(0x0806, bad, BROADCAST_MAC));
    guest.sendFrame(ethernet(0x0806, arp(1, GUEST, GATEWAY).subarray(0, 27), BROADCAST_MAC));
    guest.sendFrame(ethernet(0x0806, arp(3, GUEST, GATEWAY), BROADCAST_MAC));
    await guest.settle();
    expect(dropped.malformed).toBe(2);
    expect(dropped.unsupported).toBe(1);
    expect(guest.taken(() => true)).toEqual([]);
  });
});

describe('ICMP', () => {
  test('echo is answered by the gateway and the DNS server', async () => {
    await using guest = await Guest.open();
    for (const [i, address] of [GATEWAY, DNS].entries()) {
      for (const size of [0, 1, 56, 1400]) {
        const data = Buffer.alloc(size, 'x');
        guest.send(icmpEcho(address, 7, i, data));
        const reply = await guest.nextDatagram((d) => d.protocol === 1);
        expect(reply.source).toBe(address);
        expect([...reply.payload.subarray(0, 2)]).toEqual([0, 0]);
        expect(reply.payload.subarray(4)).toEqual(Buffer.concat([Buffer.from([0, 7, 0, i]), data]));
      }
    }
    expect(guest.faults).toEqual([]);
  });

  test('echo to elsewhere, other types and wrong checksums are dropped', async () => {
    await using guest = await Guest.open();
    const { dropped } = guest.network.counters;
    guest.send(icmpEcho('192.0.2.1', 1, 1, Buffer.alloc(8)));
    guest.send(ipv4(GATEWAY, 1, withSum(Buffer.from([13, 0, 0, 0, 0, 1, 0, 1]))));
    guest.send(ipv4(GATEWAY, 1, Buffer.from([8, 0, 1, 2, 0, 1, 0, 1])));
    guest.send(ipv4(GATEWAY, 1, Buffer.from([8, 0, 0])));
    await guest.settle();
    expect(dropped).toMatchObject({ unreachable: 1, unsupported: 1, checksum: 1, malformed: 1 });
    expect(guest.taken(() => true)).toEqual([]);
  });
});

function withSum(message: Buffer): Buffer {
  message.writeUInt16BE(0, 2);
  message.writeUInt16BE(checksum(message), 2);
  return message;
}

describe('frames that are dropped and counted', () => {
  const datagram = () => udp(GATEWAY, 9, 1000, UDP);
  const patched = (at: number, value: number, sum = true) => {
    const bytes = datagram();
    bytes[at] = value;
    if (sum) {
      bytes.writeUInt16BE(0, 10);
      bytes.writeUInt16BE(checksum(bytes.subarray(0, 20)), 10);
    }
    return ethernet(0x0800, bytes);
  };
  const header = (fields: Record<number, number>) => Buffer.from(Array.from({ length: 12 }, (_, i) => fields[i] ?? 0));
  const plain = ethernet(0x0800, datagram());

  const cases: [string, string, Buffer, Buffer?][] = [
    ['an empty message', 'malformed', Buffer.alloc(0), Buffer.alloc(0)],
    ['less than a virtio header', 'malformed', Buffer.alloc(0), Buffer.alloc(11)],
    ['a runt', 'malformed', Buffer.alloc(13)],
    ['a multicast source', 'malformed', ethernet(0x0800, datagram(), undefined, Buffer.from('010000000001', 'hex'))],
    ['IPv6', 'ipv6', ethernet(0x86dd, Buffer.alloc(40))],
    ['a VLAN', 'unsupported', ethernet(0x8100, Buffer.alloc(40))],
    ['an IEEE 802.3 length', 'unsupported', ethernet(46, Buffer.alloc(46))],
    ['another MAC', 'otherMac', ethernet(0x0800, datagram(), Buffer.from('525400000001', 'hex'))],
    ['no IPv4 header', 'malformed', ethernet(0x0800, Buffer.alloc(19, 0x45))],
    ['version 6', 'malformed', patched(0, 0x65)],
    ['a header of 16 bytes', 'malformed', patched(0, 0x44)],
    ['a header beyond the packet', 'malformed', patched(0, 0x4f)],
    ['a length beyond the frame', 'malformed', patched(3, 255)],
    ['a length below the header', 'malformed', patched(3, 19)],
    ['TTL 0', 'malformed', patched(8, 0)],
    ['a wrong IPv4 checksum', 'checksum', patched(10, 0x11, false)],
    ['SCTP', 'unsupported', patched(9, 132)],
    ['a source outside the network', 'spoofed', patched(12, 11)],
    ['the gateway as source', 'spoofed', patched(15, 2)],
    ['the broadcast address as source', 'spoofed', patched(15, 255)],
    ['a destination in 127/8', 'unreachable', patched(16, 127)],
    ['a destination in 0/8', 'unreachable', patched(16, 0)],
    ['a destination in 240/4', 'unreachable', patched(16, 241)],
    ['a neighbour', 'unreachable', ethernet(0x0800, udp('10.0.2.77', 9, 1000, UDP))],
    ['the DNS server’s other ports', 'unreachable', ethernet(0x0800, udp(DNS, 54, 1000, UDP))],
    ['multicast', 'broadcast', ethernet(0x0800, udp('224.0.0.251', 5353, 5353, UDP), BROADCAST_MAC)],
    ['broadcast', 'broadcast', ethernet(0x0800, udp('10.0.2.255', 137, 137, UDP), BROADCAST_MAC)],
    ['limited broadcast', 'broadcast', ethernet(0x0800, udp('255.255.255.255', 137, 137, UDP), BROADCAST_MAC)],
    ['a wrong UDP checksum', 'checksum', patched(28, 0x11)],
    ['a UDP length beyond the packet', 'malformed', patched(25, 14)],
    ['a UDP length below its header', 'malformed', patched(25, 7)],
    ['UDP port 0', 'malformed', ethernet(0x0800, udp(GATEWAY, 0, 1000, UDP))],
    ['TCP without a header', 'malformed', ethernet(0x0800, ipv4(GATEWAY, 6, Buffer.alloc(19, 1)))],
    ['a TCP header beyond the packet', 'malformed', ethernet(0x0800, ipv4(GATEWAY, 6, Buffer.alloc(20, 0xf1)))],
    ['a wrong TCP checksum', 'checksum', ethernet(0x0800, ipv4(GATEWAY, 6, Buffer.alloc(20, 0x51)))],
    ['UFO', 'unsupported', plain, header({ 0: 1, 1: 3, 4: 8, 6: 34, 8: 6 })],
    ['TSO of UDP', 'unsupported', plain, header({ 0: 1, 1: 1, 4: 8, 6: 34, 8: 6 })],
    ['a checksum field beyond the frame', 'malformed', plain, header({ 0: 1, 6: 34, 7: 1, 8: 6 })],
  ];

  test.each(cases)('%s: %s', async (_name, reason, frame, virtio) => {
    await using guest = await Guest.open();
    guest.sendFrame(frame, virtio);
    await guest.settle();
    const { dropped } = guest.network.counters;
    expect(Object.entries(dropped).filter(([, count]) => count > 0)).toEqual([[reason, 1]]);
    expect(guest.taken((one) => one.type !== 0x0806)).toEqual([]);
    expect(guest.network.counters.udpMappingsNow).toBe(0);
    expect(guest.network.counters.tcpNow).toBe(0);
  });
});

describe('the stream', () => {
  test('a length that cannot be right ends it', async () => {
    await using guest = await Guest.open();
    guest.socket.write(Buffer.from([0, 1, 0x00, 0x1b]));
    await new Promise((resolve) => guest.socket.once('close', resolve));
    expect(guest.network.counters.brokenLinks).toBe(1);
  });

  test('a control message of an unknown type is counted and skipped', async () => {
    await using guest = await Guest.open();
    guest.socket.write(Buffer.from([0x80, 0, 0, 3, 99, 1, 2, 0x80, 0, 0, 0, 0x80, 0, 0, 1, 1]));
    await guest.settle();
    expect(guest.network.counters.dropped.malformed).toBe(3);
  });

  test('a device may go and another come', async () => {
    await using guest = await Guest.open();
    await guest.settle();
    guest.socket.destroy();
    await using again = await Guest.attach(guest.network);
    await again.settle();
    expect(again.faults).toEqual([]);
  });
});
