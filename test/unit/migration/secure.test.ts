import { existsSync, statSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { connect as connectTls, type TLSSocket } from 'node:tls';
import { expect, test } from 'vitest';
import type { Address } from '#dist/migration/address.js';
import { connectSecurely, isRefusal, keyBytes, SecureListener } from '#dist/migration/secure.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const LOOPBACK: Address = { kind: 'tcp', host: '127.0.0.1', port: 0 };
const folder = temporaryFolder();
const key = keyBytes('0123456789abcdef');
const other = keyBytes('0123456789abcdeF');

async function listen(address: Address = LOOPBACK) {
  const visitors: TLSSocket[] = [];
  const wrong: Error[] = [];
  const listener = await SecureListener.open(address, key, 1000, {
    connected: (socket) => visitors.push(socket.on('error', () => {})),
    wrongKey: (error) => wrong.push(error),
  });
  return { listener, visitors, wrong, where: listener.address, [Symbol.dispose]: () => listener.close() };
}

test('who has the key gets in, and what is sent is encrypted with a key of this connection', async () => {
  using here = await listen();
  const socket = await connectSecurely(here.where, key, 60_000);
  expect(socket.getProtocol()).toBe('TLSv1.2');
  expect(socket.getCipher().standardName).toMatch(/^TLS_DHE_PSK_WITH_AES_(128|256)_GCM_SHA/);
  expect(here.visitors).toHaveLength(1);
  socket.destroy();
});

test('another key is told to both sides, and nobody gets in', async () => {
  using here = await listen();
  await expect(connectSecurely(here.where, other, 60_000)).rejects.toMatchObject({
    code: 'ERR_MIGRATION',
    message: expect.stringContaining('the other side has another key; give both the same'),
  });
  await expect.poll(() => here.wrong.length).toBe(1);
  expect(here.visitors).toEqual([]);
});

test('a side that has only a certificate, or no key at all, does not get in', async () => {
  using here = await listen();
  const { port } = here.where as { port: number };
  const socket = connectTls({ host: '127.0.0.1', port, rejectUnauthorized: false });
  const error = await new Promise<Error>((resolve) => socket.on('error', resolve));
  expect(error.message).toContain('handshake failure');
  expect(here.visitors).toEqual([]);
});

test('visitors who do not speak TLS, or nothing, change nothing', async () => {
  using here = await listen();
  const { port } = here.where as { port: number };
  const rude = connect(port, '127.0.0.1', () => rude.write('GET / HTTP/1.0\r\n\r\n'));
  rude.on('error', () => {});
  const silent = connect(port, '127.0.0.1').on('error', () => {});
  await Promise.all([rude, silent].map((socket) => new Promise((resolve) => socket.on('close', resolve))));
  expect(here.wrong).toEqual([]);
  (await connectSecurely(here.where, key, 60_000)).destroy();
});

test('a Unix socket is for this user alone, takes the place of one that a dead process left, and goes', async () => {
  const path = join(folder, 'target.sock');
  {
    using here = await listen({ kind: 'unix', path });
    expect(statSync(path).mode & 0o777).toBe(0o600);
    (await connectSecurely(here.where, key, 60_000)).destroy();
    await expect(listen({ kind: 'unix', path })).rejects.toThrow('another process listens on it');
  }
  expect(existsSync(path)).toBe(false);
  writeFileSync(path, '');
  await expect(listen({ kind: 'unix', path })).rejects.toThrow('there is a file of that name');
});

test('where nobody listens is told so', async () => {
  const { where, listener } = await listen();
  listener.close();
  const error = await connectSecurely(where, key, 60_000).catch((error) => error);
  expect(error.message).toContain('nobody listens there; start the target first');
  expect(isRefusal(error.cause)).toBe(true);
  const missing = await connectSecurely({ kind: 'unix', path: join(folder, 'none') }, key, 60_000).catch(
    (error) => error,
  );
  expect(isRefusal(missing.cause)).toBe(true);
});

test('a key that is too short is refused', () => {
  expect(() => keyBytes('fifteen bytes..')).toThrow('key: 15 bytes are too few; give 16 or more that are random');
  expect(() => keyBytes(5 as never)).toThrow('key: must be text or bytes');
  expect(keyBytes(Buffer.from('0123456789abcdef'))).toEqual(key);
});
