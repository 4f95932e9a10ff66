import { createHash, randomBytes } from 'node:crypto';
import { rmSync, writeFileSync } from 'node:fs';
import { type AddressInfo, createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Machine, SharedThread } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { resources } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
const MINUTES = Number(process.env.TSVISOR_CASES ?? 30);
const MACHINES = 8;
const MiB = 2 ** 20;
const HOUR = 3_600_000;

/** What a machine is asked for; each throws when an answer is wrong. */
const LOADS: ((machine: Machine, index: number, port: number) => Promise<Machine>)[] = [
  async function exec(machine) {
    const bytes = randomBytes(64 * 1024);
    const { stdout } = await machine.exec('sha256sum', { stdin: bytes, timeout: HOUR });
    expect(stdout.split(' ')[0]).toBe(createHash('sha256').update(bytes).digest('hex'));
    return machine;
  },
  async function disk(machine) {
    const script = `
      dd if=/dev/urandom of=/tmp/block bs=4096 count=32 2>/dev/null
      dd if=/tmp/block of=/dev/vda bs=4096 seek=$((RANDOM % 200)) conv=fsync 2>/dev/null
      sha256sum < /tmp/block; sha256sum < /tmp/block`;
    const [first, second] = (await machine.exec(script, { timeout: HOUR })).stdout.trim().split('\n');
    expect(first).toMatch(/^[0-9a-f]{64}/);
    expect(second).toBe(first);
    return machine;
  },
  async function net(machine, index, port) {
    const said = `machine ${index} ${randomBytes(8).toString('hex')}`;
    const script = `ip addr add 10.0.2.15/24 dev eth0 2>/dev/null; ip link set eth0 up
      echo "${said}" | nc -w 20 10.0.2.2 ${port}`;
    expect((await machine.exec(script, { timeout: HOUR })).stdout.trim()).toBe(said);
    return machine;
  },
  async function snapshot(machine, index) {
    const path = join(folder, `saved-${index}-${randomBytes(4).toString('hex')}`);
    await machine.exec(`echo ${path} > /tmp/path`, { timeout: HOUR });
    await machine.snapshot(path, { stop: true });
    await machine.close();
    const next = await Machine.restore(path, threads[index] ? { thread: threads[index] as SharedThread } : {});
    rmSync(path, { recursive: true }); // its files are open
    await next.resume();
    expect((await next.exec('cat /tmp/path', { timeout: HOUR })).stdout.trim()).toBe(path);
    return next;
  },
];
const threads: (SharedThread | undefined)[] = [];

describeKvm(`${MINUTES} minutes of mixed load on ${MACHINES} machines`, () => {
  let server: Server;
  const shared = new SharedThread();
  const machines: Machine[] = [];

  beforeAll(async () => {
    server = createServer((socket) => {
      socket.on('error', () => {});
      socket.once('data', (data) => socket.end(data));
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const image = join(folder, 'disk.img');
    writeFileSync(image, Buffer.alloc(MiB));
    await using first = await Machine.create({ agent: true, drives: [{ file: image }], networks: [{ type: 'user' }] });
    await first.start();
    await first.ready({ timeout: HOUR });
    await first.exec('while [ -e /etc/applets ]; do sleep 0.2; done', { timeout: HOUR });
    const path = join(folder, 'first');
    await first.snapshot(path);
    for (let index = 0; index < MACHINES; index++) {
      threads.push(index % 2 ? shared : undefined);
      const machine = await Machine.restore(path, index % 2 ? { thread: shared } : {});
      machines.push(machine);
      await machine.resume();
      await machine.ready({ timeout: HOUR });
    }
  }, HOUR);
  afterAll(async () => {
    await Promise.all(machines.map((machine) => machine.close()));
    await shared.close();
    server.close();
  });

  it('leaves memory, descriptors and threads where they were, with every answer right', {
    timeout: 2 * HOUR,
  }, async () => {
    const end = Date.now() + MINUTES * 60_000;
    let operations = 0;
    const seen: { rss: number; descriptors: number; threads: number }[] = [];
    const look = () => {
      const { rssBytes, descriptors, threads } = resources();
      seen.push({ rss: Math.round(rssBytes / MiB), descriptors, threads });
      // biome-ignore lint/suspicious/noConsole: what such a test is run for
      console.log(
        `${operations} operations: RSS ${Math.round(rssBytes / MiB)} MiB, ${descriptors} descriptors, ${threads} threads`,
      );
    };
    const timer = setInterval(look, (MINUTES * 60_000) / 10);
    try {
      await Promise.all(
        machines.map(async (_, index) => {
          for (let round = index; Date.now() < end; round++, operations++) {
            const load = LOADS[round % LOADS.length] as (typeof LOADS)[0];
            machines[index] = await load(machines[index] as Machine, index, (server.address() as AddressInfo).port);
          }
        }),
      );
    } finally {
      clearInterval(timer);
    }
    // In the middle of operations some of each is held for a moment; what leaks grows with every operation.
    const third = Math.ceil(seen.length / 3);
    const most = (what: 'rss' | 'descriptors' | 'threads', from: typeof seen) =>
      Math.max(...from.map((at) => at[what]));
    const [early, late] = [seen.slice(0, third), seen.slice(-third)];
    expect(operations).toBeGreaterThan(MACHINES * LOADS.length);
    expect(most('descriptors', late)).toBeLessThanOrEqual(most('descriptors', early) + 16);
    expect(most('threads', late)).toBeLessThanOrEqual(most('threads', early) + 16);
    expect(most('rss', late)).toBeLessThanOrEqual(most('rss', early) * 1.25 + 32);
  });
});
