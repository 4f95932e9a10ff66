import { mkdirSync, writeFileSync } from 'node:fs';
import { type AddressInfo, createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Machine } from '#dist/index.js';
import { guestWithPrograms } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, lasting } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

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

/** What a command of the guest prints. */
const run = async (machine: Machine, command: string) => (await machine.exec(command, { timeout: OPERATION })).stdout;

/** What the three workers of the guest have come to, and its clocks; by one program: each takes a second where KVM interprets. */
async function look(machine: Machine) {
  const before = Date.now() / 1000;
  const files = [
    '/tmp/busy.compute',
    '/tmp/busy.disk',
    '/tmp/busy.net',
    '/proc/uptime',
    '/proc/stat',
    '/tmp/busy.wrong',
  ];
  const { stdout } = await machine.exec('cat', { args: files, timeout: OPERATION });
  const after = Date.now() / 1000;
  const [compute, disk, net, uptime, ...rest] = stdout.trimEnd().split('\n');
  const [n, x, sum] = (compute as string).trim().split(/ +/);
  const [connections, lost] = (net as string).trim().split(/ +/).map(Number);
  const monotonic = Number.parseFloat(uptime as string);
  // The second in which the clock would have stood at 0 of the monotonic one.
  const wall = Number(/^btime (\d+)$/m.exec(stdout)?.[1]) + monotonic;
  return {
    steps: BigInt(n as string),
    x: BigInt(x as string),
    sum: Number(sum),
    blocks: Number((disk as string).trim().split(/ +/)[0]),
    connections: connections as number,
    lost: lost as number,
    wrong: rest.filter((line) => line.includes('errno')),
    monotonic,
    /** Seconds from the host's wall clock to the guest's. */
    offset: wall + 1 < before ? wall + 1 - before : wall > after ? wall - after : 0,
  };
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
    await first.exec('ip addr add 10.0.2.15/24 dev eth0 2>/dev/null; ip link set eth0 up; true', { timeout: BOOT });
    await first.exec(`busy /dev/vda 10.0.2.2 ${(server.address() as AddressInfo).port} /tmp/busy`, { timeout: BOOT });
    for (let n = 0; n < 100; n++) {
      const { stdout } = await first.exec('ls', { args: ['/tmp'], timeout: BOOT });
      if (['compute', 'disk', 'net'].every((name) => stdout.includes(`busy.${name}`))) break;
    }
  }, BOOT);
  afterAll(async () => {
    await first?.close();
    server?.close();
  });

  it(`goes on from a snapshot of a machine that did, ${ROUNDS} times in a row`, {
    timeout: OPERATION + ROUNDS * OPERATION,
  }, async () => {
    const open = await first.spawn('cat');
    let machine = first;
    let last = await look(machine);
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
      const now = await look(machine);
      expect(now.wrong).toEqual([]);
      expect(now.x).toBe(generator(now.steps));
      expect(now.sum).toBe(sum.upTo(Number(now.steps)));
      expect(now.steps).toBeGreaterThanOrEqual(last.steps);
      expect(now.blocks).toBeGreaterThanOrEqual(last.blocks);
      expect(now.connections).toBeGreaterThanOrEqual(last.connections);
      expect(now.monotonic).toBeGreaterThanOrEqual(last.monotonic);
      expect(Math.abs(now.offset)).toBeLessThan(10); // its agent may wait long for a CPU once it is told the time
      last = now;
    }
    // Every worker works, not only goes on.
    for (const key of ['steps', 'blocks', 'connections'] as const) {
      await expect.poll(async () => (await look(machine))[key], { timeout: OPERATION }).toBeGreaterThan(last[key]);
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
    expect((await look(first)).wrong).toEqual([]);
    // The guest's connections end, and none of a machine that is gone is left.
    const connections = () => new Promise<number>((resolve) => server.getConnections((_, count) => resolve(count)));
    await expect.poll(connections, { timeout: OPERATION }).toBe(0);
  });

  it('forks into machines that know nothing of each other', { timeout: OPERATION }, async () => {
    await run(first, 'echo before > /tmp/fork');
    await using fork = await first.fork();
    await run(first, 'echo first > /tmp/fork');
    await fork.resume();
    expect(await run(fork, 'cat /tmp/fork')).toBe('before\n');
    await fork.exec('echo fork > /tmp/fork; dd if=/dev/zero of=/dev/vda bs=4096 count=1 seek=255 conv=fsync', {
      timeout: OPERATION,
    });
    expect(await run(first, 'cat /tmp/fork')).toBe('first\n');
    const [mine, its] = [await look(first), await look(fork)];
    expect(mine.wrong).toEqual([]);
    expect(its.x).toBe(generator(its.steps));
  });

  it('is saved by what has changed alone', { timeout: OPERATION }, async () => {
    const base = join(folder, 'base');
    const full = await first.snapshot(base, { track: true });
    const layers = [full];
    for (let n = 0; n < 3; n++) {
      await run(first, `echo ${n} > /tmp/layer-${n}`);
      layers.push(await first.snapshot(join(folder, `layer-${n}`), { differential: true }));
    }
    await first.pause();
    for (const { memoryBytes } of layers.slice(1)) expect(memoryBytes).toBeLessThan(full.memoryBytes);
    await using machine = await Machine.restore(join(folder, 'layer-2'), { track: true });
    await machine.resume();
    const written = await machine.exec('cat', {
      args: ['/tmp/layer-0', '/tmp/layer-1', '/tmp/layer-2'],
      timeout: OPERATION,
    });
    expect(written.stdout).toBe('0\n1\n2\n');
    const now = await look(machine);
    expect(now.wrong).toEqual([]);
    expect(now.x).toBe(generator(now.steps));
    // A restored machine's changes, by its own log.
    await run(machine, 'echo more > /tmp/more');
    await machine.snapshot(join(folder, 'layer-3'), { differential: true, stop: true });
    await machine.close();
    await using again = await Machine.restore(join(folder, 'layer-3'));
    await again.resume();
    expect((await again.exec('cat', { args: ['/tmp/layer-0', '/tmp/more'], timeout: OPERATION })).stdout).toBe(
      '0\nmore\n',
    );
    await first.resume();
  });

  it('has clones that share a snapshot and none of their writes', { timeout: OPERATION }, async () => {
    const path = join(folder, 'clones');
    await first.snapshot(path);
    await first.pause();
    const clones = await Promise.all(Array.from({ length: 4 }, () => Machine.restore(path)));
    try {
      await Promise.all(clones.map((clone) => clone.resume()));
      await Promise.all(clones.map((clone, n) => run(clone, `echo ${n} > /tmp/own`)));
      const own = await Promise.all(clones.map((clone) => run(clone, 'cat /tmp/own')));
      expect(own).toEqual(['0\n', '1\n', '2\n', '3\n']);
    } finally {
      await Promise.all(clones.map((clone) => clone.close()));
    }
  });
});
