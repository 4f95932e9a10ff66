import { mkdirSync, writeFileSync } from 'node:fs';
import { type AddressInfo, createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Machine } from '#dist/index.js';
import { guestWithPrograms } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, lasting } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
const BOOT = 600_000;
const OPERATION = 400_000;
/** How often the machine is saved and restored in a row. */
const ROUNDS = Number(process.env.TSVISOR_CASES ?? 6);

const A = 6364136223846793005n;
const C = 1442695040888963407n;
const u64 = (value: bigint) => BigInt.asUintN(64, value);

/** The state of the guest's generator after n steps from 1. */
function generator(n: bigint): bigint {
  let [a, c, x] = [A, C, 1n];
  for (let left = n; left > 0n; left >>= 1n) {
    if (left & 1n) x = u64(a * x + c);
    c = u64((a + 1n) * c);
    a = u64(a * a);
  }
  return x;
}

/** The guest's sum, added up as it does. */
class Sum {
  #n = 0;
  #sum = 0;

  upTo(n: number): number {
    while (this.#n < n) {
      this.#n++;
      this.#sum += 1 / ((this.#n % 1000) + 1);
    }
    return this.#sum;
  }
}

async function echo(): Promise<Server> {
  const server = createServer((socket) => {
    socket.on('error', () => {});
    socket.pipe(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return server;
}

/** What the three workers of the guest have come to. */
async function progress(machine: Machine) {
  const { stdout } = await machine.exec(
    'cd /tmp; cat busy.compute busy.disk busy.net; cat busy.wrong 2>/dev/null; true',
  );
  const [compute, disk, net, ...wrong] = stdout.trimEnd().split('\n');
  const [n, x, sum] = (compute as string).trim().split(/ +/);
  const [connections, lost] = (net as string).trim().split(/ +/).map(Number);
  return {
    steps: BigInt(n as string),
    x: BigInt(x as string),
    sum: Number(sum),
    blocks: Number((disk as string).trim().split(/ +/)[0]),
    connections: connections as number,
    lost: lost as number,
    wrong,
  };
}

/** Seconds: how far the guest's wall clock is from the host's, and its monotonic one. */
async function clocks(machine: Machine): Promise<{ offset: number; monotonic: number }> {
  const before = Date.now() / 1000;
  const { stdout } = await machine.exec('date +%s; cut -d" " -f1 /proc/uptime');
  const [wall, monotonic] = stdout.split('\n').map(Number) as [number, number];
  const after = Date.now() / 1000;
  // date tells whole seconds
  const offset = wall < Math.floor(before) ? wall - before : wall > after ? wall - after : 0;
  return { offset, monotonic };
}

describeKvm('a machine that computes and does disk and network I/O', () => {
  let server: Server;
  let image: string;
  let first: Machine;
  const sum = new Sum();

  beforeAll(async () => {
    server = await echo();
    image = join(folder, 'disk.img');
    writeFileSync(image, Buffer.alloc(1 << 20));
    const programs = join(folder, 'programs');
    mkdirSync(programs);
    first = await Machine.create({
      ...guestWithPrograms(programs, ['busy']),
      agent: true,
      drives: [{ file: image }],
      networks: [{ type: 'user' }],
    });
    await first.start();
    await first.ready({ timeout: BOOT });
    await first.exec('ip addr add 10.0.2.15/24 dev eth0 2>/dev/null; ip link set eth0 up; true');
    await first.exec(`busy /dev/vda 10.0.2.2 ${(server.address() as AddressInfo).port} /tmp/busy`);
    for (let n = 0; n < 100; n++) {
      const { stdout } = await first.exec('ls /tmp');
      if (['compute', 'disk', 'net'].every((name) => stdout.includes(`busy.${name}`))) break;
    }
  }, BOOT);
  afterAll(async () => {
    await first?.close();
    server?.close();
  });

  it(`goes on from a snapshot of a machine that did, ${ROUNDS} times in a row`, {
    timeout: ROUNDS * 60_000,
  }, async () => {
    const open = await first.spawn('cat');
    let machine = first;
    let last = await progress(machine);
    let lastClock = await clocks(machine);
    let before = lasting();
    for (let round = 0; round < ROUNDS; round++) {
      const path = join(folder, `round-${round}`);
      const info = await machine.snapshot(path, { stop: machine !== first });
      expect(info.memoryBytes).toBeGreaterThan(1 << 20);
      if (machine === first) {
        await first.pause(); // it would take half of what the host can do, and threads for its disk
        before = lasting();
      } else await machine.close();
      machine = await Machine.restore(path);
      expect(machine.state).toBe('paused');
      await machine.resume();
      const now = await progress(machine);
      expect(now.wrong).toEqual([]);
      expect(now.x).toBe(generator(now.steps));
      expect(now.sum).toBe(sum.upTo(Number(now.steps)));
      expect(now.steps).toBeGreaterThanOrEqual(last.steps);
      expect(now.blocks).toBeGreaterThanOrEqual(last.blocks);
      expect(now.connections).toBeGreaterThanOrEqual(last.connections);
      const clock = await clocks(machine);
      expect(clock.monotonic).toBeGreaterThanOrEqual(lastClock.monotonic);
      expect(Math.abs(clock.offset)).toBeLessThan(2);
      [last, lastClock] = [now, clock];
    }
    // Every worker works, not only goes on.
    for (const key of ['steps', 'blocks', 'connections'] as const) {
      await expect.poll(async () => (await progress(machine))[key], { timeout: OPERATION }).toBeGreaterThan(last[key]);
    }
    await machine.close();
    await expectNoMoreThan(before, lasting);
    // The first machine, and its stream, know nothing of all that.
    await first.resume();
    open.stdin?.write('still here\n');
    const chunk = await new Promise<Buffer>((resolve) => open.stdout?.once('data', resolve));
    expect(chunk.toString()).toBe('still here\n');
    await open.kill('SIGTERM');
    await open.exited;
    expect((await progress(first)).wrong).toEqual([]);
    // The guest's connections end, and none of a machine that is gone is left.
    const connections = () => new Promise<number>((resolve) => server.getConnections((_, count) => resolve(count)));
    await expect.poll(connections, { timeout: OPERATION }).toBe(0);
  });

  it('forks into machines that know nothing of each other', { timeout: OPERATION }, async () => {
    await first.exec('echo before > /tmp/fork');
    await using fork = await first.fork();
    await first.exec('echo first > /tmp/fork');
    await fork.resume();
    expect((await fork.exec('cat /tmp/fork')).stdout).toBe('before\n');
    await fork.exec('echo fork > /tmp/fork; dd if=/dev/zero of=/dev/vda bs=4096 count=1 seek=255 conv=fsync');
    expect((await first.exec('cat /tmp/fork')).stdout).toBe('first\n');
    const [mine, its] = [await progress(first), await progress(fork)];
    expect(mine.wrong).toEqual([]);
    expect(its.x).toBe(generator(its.steps));
  });

  it('is saved by what has changed alone', { timeout: OPERATION }, async () => {
    const base = join(folder, 'base');
    const full = await first.snapshot(base, { track: true });
    const layers = [full];
    for (let n = 0; n < 3; n++) {
      await first.exec(`echo ${n} > /tmp/layer-${n}`);
      layers.push(await first.snapshot(join(folder, `layer-${n}`), { differential: true }));
    }
    for (const { memoryBytes } of layers.slice(1)) expect(memoryBytes).toBeLessThan(full.memoryBytes);
    await using machine = await Machine.restore(join(folder, 'layer-2'), { track: true });
    await machine.resume();
    expect((await machine.exec('cat /tmp/layer-0 /tmp/layer-1 /tmp/layer-2')).stdout).toBe('0\n1\n2\n');
    const now = await progress(machine);
    expect(now.wrong).toEqual([]);
    expect(now.x).toBe(generator(now.steps));
    // A restored machine's changes, by its own log.
    await machine.exec('echo more > /tmp/more');
    await machine.snapshot(join(folder, 'layer-3'), { differential: true, stop: true });
    await machine.close();
    await using again = await Machine.restore(join(folder, 'layer-3'));
    await again.resume();
    expect((await again.exec('cat /tmp/layer-0 /tmp/more')).stdout).toBe('0\nmore\n');
  });

  describe('clones', () => {
    it('share a snapshot and none of their writes', { timeout: OPERATION }, async () => {
      const path = join(folder, 'clones');
      await first.snapshot(path);
      const clones = await Promise.all(Array.from({ length: 4 }, () => Machine.restore(path)));
      try {
        await Promise.all(clones.map((clone) => clone.resume()));
        await Promise.all(clones.map((clone, n) => clone.exec(`echo ${n} > /tmp/own`)));
        const own = await Promise.all(clones.map((clone) => clone.exec('cat /tmp/own')));
        expect(own.map(({ stdout }) => stdout)).toEqual(['0\n', '1\n', '2\n', '3\n']);
      } finally {
        await Promise.all(clones.map((clone) => clone.close()));
      }
    });
  });
});
