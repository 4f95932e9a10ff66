import { expect, test } from 'vitest';
import { Guest } from './guest.js';
import { BROADCAST_MAC, ethernet, GATEWAY, GUEST, GUEST_MAC, ip, udp } from './packets.js';

const DISCOVER = 1;
const OFFER = 2;
const REQUEST = 3;
const ACK = 5;
const NAK = 6;
const RELEASE = 7;
const INFORM = 8;

function message(type: number, options: [number, Uint8Array | number[]][] = [], client = '0.0.0.0'): Buffer {
  const fixed = Buffer.alloc(240);
  fixed.set([1, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef]);
  ip(client).copy(fixed, 12);
  GUEST_MAC.copy(fixed, 28);
  fixed.writeUInt32BE(0x63825363, 236);
  const all: [number, Uint8Array | number[]][] = [[53, [type]], ...options];
  return Buffer.concat([
    fixed,
    ...all.map(([code, value]) => Buffer.from([code, value.length, ...value])),
    Buffer.from([255]),
  ]);
}

/** Sends as a client without an address does, or one that has it. */
function send(guest: Guest, payload: Uint8Array, source = '0.0.0.0'): void {
  const destination = source === GUEST ? GATEWAY : '255.255.255.255';
  const mac = source === GUEST ? undefined : BROADCAST_MAC;
  guest.sendFrame(ethernet(0x0800, udp(destination, 67, 68, payload, { source }), mac));
}

async function reply(guest: Guest) {
  const datagram = await guest.nextDatagram((d) => d.protocol === 17 && d.payload.readUInt16BE(2) === 68);
  expect(datagram.source).toBe(GATEWAY);
  expect(datagram.payload.readUInt16BE(0)).toBe(67);
  const bytes = datagram.payload.subarray(8);
  expect([bytes[0], bytes.readUInt32BE(4), bytes.subarray(28, 34)]).toEqual([2, 0xdeadbeef, GUEST_MAC]);
  expect(bytes.readUInt32BE(236)).toBe(0x63825363);
  expect(bytes.length).toBeGreaterThanOrEqual(300);
  const options: Record<number, Buffer> = {};
  for (let at = 240; bytes[at] !== 255; at += 2 + bytes.readUInt8(at + 1)) {
    options[bytes.readUInt8(at)] = bytes.subarray(at + 2, at + 2 + bytes.readUInt8(at + 1));
  }
  const address = [...bytes.subarray(16, 20)].join('.');
  return { type: options[53]?.[0], address, options, destination: datagram.destination };
}

const PARAMETERS = {
  1: Buffer.from([255, 255, 255, 0]),
  3: ip(GATEWAY),
  6: ip('10.0.2.3'),
  26: Buffer.from([1500 >> 8, 1500 & 255]),
  28: ip('10.0.2.255'),
  54: ip(GATEWAY),
};

test('an address is offered and given', async () => {
  await using guest = await Guest.open({ hostName: 'box' });
  send(guest, message(DISCOVER));
  const offer = await reply(guest);
  expect(offer).toMatchObject({ type: OFFER, address: GUEST, destination: '255.255.255.255' });
  expect(offer.options).toMatchObject({ ...PARAMETERS, 12: Buffer.from('box'), 51: Buffer.from([0, 1, 0x51, 0x80]) });
  send(
    guest,
    message(REQUEST, [
      [50, ip(GUEST)],
      [54, ip(GATEWAY)],
    ]),
  );
  const ack = await reply(guest);
  expect(ack).toMatchObject({ type: ACK, address: GUEST, options: offer.options && { 51: offer.options[51] } });
  expect(guest.faults).toEqual([]);
});

test('a lease is renewed by a client that has it, and by one that remembers it', async () => {
  await using guest = await Guest.open();
  send(guest, message(REQUEST, [], GUEST), GUEST);
  expect(await reply(guest)).toMatchObject({ type: ACK, address: GUEST, destination: GUEST });
  send(guest, message(REQUEST, [[50, ip(GUEST)]]));
  const rebooted = await reply(guest);
  expect(rebooted).toMatchObject({ type: ACK, address: GUEST, destination: '255.255.255.255' });
  expect(rebooted.options[12]).toBeUndefined();
});

test('another address is refused, another server’s offer is left alone', async () => {
  await using guest = await Guest.open();
  send(guest, message(REQUEST, [[50, ip('10.0.2.16')]]));
  const nak = await reply(guest);
  expect(nak).toMatchObject({ type: NAK, address: '0.0.0.0' });
  expect(Object.keys(nak.options)).toEqual(['53', '54']);
  send(
    guest,
    message(REQUEST, [
      [50, ip('192.168.1.5')],
      [54, ip('192.168.1.1')],
    ]),
  );
  send(guest, message(RELEASE, [[54, ip(GATEWAY)]], GUEST));
  await guest.settle();
  expect(guest.taken((frame) => frame.type === 0x0800)).toEqual([]);
});

test('INFORM gets parameters and no lease', async () => {
  await using guest = await Guest.open();
  send(guest, message(INFORM, [], GUEST), GUEST);
  const ack = await reply(guest);
  expect(ack).toMatchObject({ type: ACK, address: '0.0.0.0', options: PARAMETERS });
  expect(ack.options[51]).toBeUndefined();
});

test('malformed messages are dropped', async () => {
  await using guest = await Guest.open();
  const good = message(DISCOVER);
  const patched = (at: number, value: number) => {
    const bytes = Buffer.from(good);
    bytes[at] = value;
    return bytes;
  };
  const bad = [
    Buffer.alloc(0),
    good.subarray(0, 239),
    patched(0, 2),
    patched(1, 6),
    patched(2, 7),
    patched(237, 0),
    good.subarray(0, 241), // an option without its length
    patched(241, 9), // an option that ends beyond the message
    patched(240, 52), // no message type
    patched(240, 255), // no option at all
  ];
  for (const payload of bad) send(guest, payload);
  send(guest, patched(242, 77)); // an unknown type
  await guest.settle();
  expect(guest.network.counters.dropped).toMatchObject({ malformed: bad.length, unsupported: 1 });
  expect(guest.taken((frame) => frame.type === 0x0800)).toEqual([]);
});
