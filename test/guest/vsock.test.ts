import { once } from 'node:events';
import { mkdtempSync, rmSync, statSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { finished } from 'node:stream/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Machine, type VsockStream } from '#dist/index.js';
import { Console } from '../support/console.js';
import { defaultGuest, guestWithPrograms } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';

const BOOT = 600_000;
const TRANSFER = 300_000;
const LENGTH = 1 << 20;
const STREAMS = 64;
/** Where the guest's program serves: see test/guest/programs/vsock.c. */
const PORTS = { echo: 7000, sum: 7001, pattern: 7002, close: 7003, hold: 7004, nothing: 7005 };
const PATIENT = { timeout: 240_000 };

/** The bytes that the guest's program sends, and takes to be intact. */
const PATTERN = Buffer.from(Uint8Array.from({ length: LENGTH }, (_, i) => Math.imul(i, 2654435761) >>> 24));

/** As the guest's program prints it. */
function sum(bytes: Uint8Array): string {
  let hash = 2166136261;
  for (const byte of bytes) hash = Math.imul(hash ^ byte, 16777619) >>> 0;
  return `${bytes.length} ${hash.toString(16).padStart(8, '0')}`;
}

/** What a stream brings until it ends. Unlike iterating over it, this leaves the other direction open. */
async function input(stream: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  stream.on('data', (chunk: Buffer) => chunks.push(chunk));
  await once(stream, 'end');
  return Buffer.concat(chunks);
}

describeKvm('a machine without vsock', () => {
  test('says so', async () => {
    await using machine = await Machine.create(defaultGuest());
    expect(() => machine.vsock).toThrow('this machine has no vsock; make it with vsock: true');
  });
});

describeKvm('vsock of a Linux guest', () => {
  let folder: string;
  let machine: Machine;
  let shell: Console;
  const socketPath = () => join(folder, 'vsock.sock');

  /** What the next connection to that port of the host sends until it ends; it is answered. */
  async function accept(port: number, answer: (stream: VsockStream) => unknown): Promise<void> {
    await using listener = machine.vsock.listen(port);
    for await (const stream of listener) {
      await answer(stream);
      return;
    }
  }

  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), 'tsvisor-vsock-'));
    machine = await Machine.create({
      ...guestWithPrograms(folder, ['vsock']),
      vsock: { cid: 42, socket: socketPath() },
    });
    shell = new Console(machine.serial);
    await expect(machine.vsock.connect(PORTS.echo)).rejects.toMatchObject({ code: 'ERR_VSOCK' }); // nothing runs yet
    await machine.start();
    await shell.prompt(BOOT / 1e3);
    await shell.run(`vsock serve ${PORTS.echo} & sleep 1`);
  }, BOOT);
  afterAll(async () => {
    await machine?.close();
    rmSync(folder, { recursive: true });
  });

  test('1 MiB to the guest', { timeout: TRANSFER }, async () => {
    const stream = await machine.vsock.connect(PORTS.sum, PATIENT);
    expect(stream.remotePort).toBe(PORTS.sum);
    stream.end(PATTERN);
    expect(await text(stream)).toBe(`${sum(PATTERN)}\n`);
  });

  test('1 MiB from the guest', { timeout: TRANSFER }, async () => {
    const stream = await machine.vsock.connect(PORTS.pattern, PATIENT);
    stream.write(`${LENGTH}\n`);
    const received = await input(stream);
    expect(received.equals(PATTERN)).toBe(true);
  });

  test('the guest connects: 1 MiB each way, each side ending by itself', { timeout: TRANSFER }, async () => {
    const accepted = accept(5000, async (stream) => {
      expect(stream.localPort).toBe(5000);
      stream.end(`${sum(await input(stream))} got.\n`); // after the guest's end
    });
    expect(await shell.run(`vsock send 5000 ${LENGTH}`, TRANSFER / 1e3)).toContain(`${sum(PATTERN)} got.`);
    await accepted;
    const fetched = accept(5001, (stream) => finished(stream.end(PATTERN), { readable: false }));
    expect(await shell.run('vsock fetch 5001', TRANSFER / 1e3)).toContain(sum(PATTERN));
    await fetched;
  });

  test('64 streams of the host at once', { timeout: TRANSFER }, async () => {
    const streams = await Promise.all(
      Array.from({ length: STREAMS }, () => machine.vsock.connect(PORTS.echo, { timeout: TRANSFER })),
    );
    const echoed = streams.map(async (stream, i) => {
      const sent = PATTERN.subarray(i * 1000, i * 1000 + 5000);
      stream.write(sent);
      let got = 0;
      for await (const chunk of stream) {
        expect(sent.subarray(got, got + chunk.length).equals(chunk)).toBe(true);
        got += chunk.length;
        if (got === sent.length) stream.end();
      }
      return got;
    });
    expect(await Promise.all(echoed)).toEqual(streams.map(() => 5000));
  });

  test('64 streams of the guest at once', { timeout: TRANSFER }, async () => {
    const listener = machine.vsock.listen(5002);
    const accepting = (async () => {
      for await (const stream of listener) stream.pipe(stream);
    })();
    expect(await shell.run(`vsock open 5002 ${STREAMS}`, TRANSFER / 1e3)).toContain(`${STREAMS} good.`);
    await listener.close();
    await accepting;
  });

  test('refusals and resets, either way', { timeout: TRANSFER }, async () => {
    await expect(machine.vsock.connect(PORTS.nothing, PATIENT)).rejects.toThrow(
      /7005 of the guest: connection refused/,
    );
    expect(await shell.run('vsock fetch 5999')).toContain('connect: Connection reset by peer');

    // The guest closes while the host still writes.
    const closed = await machine.vsock.connect(PORTS.close, PATIENT);
    await expect(finished(closed.end(PATTERN))).rejects.toMatchObject({ code: 'ERR_VSOCK' });

    // The host resets what the guest still uses.
    const held = await machine.vsock.connect(PORTS.hold, PATIENT);
    held.write('hello');
    await shell.until(/holding\./);
    held.destroy();
    await shell.until(/write failed: Broken pipe\./);
  });

  test('the Unix socket leads to the guest, and the guest to Unix sockets', { timeout: TRANSFER }, async () => {
    expect(statSync(socketPath()).mode & 0o777).toBe(0o600);
    const client = connect({ path: socketPath(), allowHalfOpen: true });
    client.write(`CONNECT ${PORTS.sum}\n`);
    client.end(PATTERN);
    expect(await text(client)).toMatch(new RegExp(`^OK \\d+\n${sum(PATTERN)}\n$`));

    const refused = connect(socketPath());
    refused.write(`CONNECT ${PORTS.nothing}\n`);
    expect(await text(refused)).toBe('');

    const server = createServer({ allowHalfOpen: true }, async (socket: Socket) => {
      socket.end(`${sum(await input(socket))} got.\n`);
    }).listen(`${socketPath()}_6000`);
    expect(await shell.run('vsock send 6000 100000', TRANSFER / 1e3)).toContain(
      `${sum(PATTERN.subarray(0, 100_000))} got.`,
    );
    server.close();
    expect(await shell.run('vsock fetch 6001')).toContain('connect: Connection reset by peer');
  });

  test('a guest that boots again: its connections are reset, listeners stay', { timeout: 2 * BOOT }, async () => {
    const reset = accept(5003, (stream) => expect(finished(stream)).rejects.toThrow('vsock: the guest was reset'));
    const later = accept(5004, (stream) => stream.end('welcome back.'));
    await shell.run('vsock reboot 5003', BOOT / 1e3);
    await reset;
    expect(await shell.run('vsock send 5004 100')).toContain('welcome back.');
    await later;
    await shell.run(`vsock serve ${PORTS.echo} & sleep 1`);
  });

  test('the end of the machine ends its streams, and leaves no socket', { timeout: TRANSFER }, async () => {
    const stream = await machine.vsock.connect(PORTS.echo, PATIENT);
    const failed = expect(finished(stream)).rejects.toThrow(/has ended/);
    await machine.stop();
    await machine.close();
    await failed;
    await expect(machine.vsock.connect(PORTS.echo)).rejects.toThrow(/has ended/);
    expect(() => statSync(socketPath())).toThrow(/ENOENT/);
  });
});
