import { expect, test } from 'vitest';
import { parseVsock } from '#dist/cli/vsock-option.js';
import { UsageError } from '#dist/errors.js';
import { resolveDevices, virtioDeviceCount } from '#dist/machine/device-config.js';

test('the configuration’s vsock', () => {
  expect(resolveDevices({}).vsock).toBeUndefined();
  expect(resolveDevices({ vsock: false }).vsock).toBeUndefined();
  expect(resolveDevices({ vsock: true }).vsock).toEqual({ cid: 3, socket: undefined });
  expect(resolveDevices({ vsock: { cid: 0xffff_fffe, socket: 'x' } }).vsock).toEqual({ cid: 0xffff_fffe, socket: 'x' });
  expect(virtioDeviceCount(resolveDevices({ vsock: true, rng: true }))).toBe(2);
});

// 5.10.6.4.2: "The guest_cid configuration field MUST NOT contain a reserved CID".
test.each([0, 1, 2, 0xffff_ffff, 2 ** 32, -3, 3.5, Number.NaN])('no CID of a guest: %d', (cid) => {
  expect(() => resolveDevices({ vsock: { cid } })).toThrow(/^vsock\.cid: .* is not a number from 3 to 2\^32 - 2$/);
});

test.each(['', 'a\0b'])('no path: %j', (socket) => {
  expect(() => resolveDevices({ vsock: { socket } })).toThrow(/^vsock\.socket: must be a path$/);
});

test('--vsock', () => {
  expect(parseVsock(undefined)).toBeUndefined();
  expect(parseVsock('')).toEqual({});
  expect(parseVsock('cid=42')).toEqual({ cid: 42 });
  expect(parseVsock('socket=a=b,cid=5')).toEqual({ cid: 5, socket: 'a=b' });
});

test.each([
  ['x', /^--vsock x: 'x' is no setting; write --vsock, or --vsock cid=42,socket=PATH$/],
  ['cid', /'cid' needs a value/],
  ['cid=', /'cid' needs a value/],
  ['cid=x', /'x' is not a number/],
  ['cid=3,cid=3', /'cid' is given twice/],
  ['socket=a,socket=b', /'socket' is given twice/],
  ['socket=a,', /'' is no setting/],
] as const)('--vsock %s', (option, message) => {
  expect(() => parseVsock(option)).toThrow(UsageError);
  expect(() => parseVsock(option)).toThrow(message);
});
