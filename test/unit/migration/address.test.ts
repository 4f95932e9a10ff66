import { expect, test } from 'vitest';
import { formatAddress, parseAddress } from '#dist/migration/address.js';

test.each([
  ['tcp:127.0.0.1:4000', { kind: 'tcp', host: '127.0.0.1', port: 4000 }],
  ['tcp:host.example:0', { kind: 'tcp', host: 'host.example', port: 0 }],
  ['tcp:[::1]:65535', { kind: 'tcp', host: '::1', port: 65535 }],
  ['unix:/run/a:b.sock', { kind: 'unix', path: '/run/a:b.sock' }],
])('%s is an address', (text, address) => {
  expect(parseAddress(text)).toEqual(address);
  expect(formatAddress(parseAddress(text))).toBe(text);
});

test.each([
  '',
  'tcp:',
  'tcp:4000',
  'tcp:host',
  'tcp:host:65536',
  'tcp:::1:80',
  'unix:',
  'unix:a\0b',
  'host:80',
  'udp:a:1',
])("'%s' is none", (text) => {
  expect(() => parseAddress(text)).toThrow('is neither tcp:HOST:PORT nor unix:PATH');
});

test('a path that no socket can have is refused', () => {
  expect(() => parseAddress(`unix:/${'x'.repeat(107)}`)).toThrow('is longer than the 107 bytes');
  expect(() => parseAddress(5 as never)).toThrow('address: must be text');
});
