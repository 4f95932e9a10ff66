import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Agent } from '#dist/agent/agent.js';
import { type GuestProcess, Machine } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
const BOOT = 600_000;
const OPERATION = 300_000;

/** One guest, saved with its streams open, from which many go on. */
describeKvm('a guest that goes on from a snapshot', () => {
  const snapshot = join(folder, 'snapshot');
  let source: Machine;
  let echo: GuestProcess;
  let detached: GuestProcess;
  beforeAll(async () => {
    source = await Machine.create({ networks: [{ type: 'user' }] });
    await source.start();
    await source.ready({ timeout: BOOT });
    await source.exec('date', { args: ['-s', '2001-01-01'] });
    echo = await source.spawn('cat', { args: [] });
    detached = await source.spawn('sleep', { args: ['2222'], detached: true });
    await source.snapshot(snapshot);
  }, BOOT);
  afterAll(() => source?.close());

  async function restored(options?: Parameters<typeof Machine.restore>[1], from = snapshot): Promise<Machine> {
    const machine = await Machine.restore(from, options);
    try {
      await machine.resume();
      await machine.ready({ timeout: OPERATION });
      return machine;
    } catch (error) {
      await machine.close();
      throw error;
    }
  }

  const read = async (machine: Machine, path: string) => (await machine.fs.readFile(path, 'utf8')).trim();
  const random = (machine: Machine) =>
    machine.exec('head', { args: ['-c', '16', '/dev/urandom'], encoding: 'buffer' }).then(({ stdout }) => stdout);
  const lives = (machine: Machine, pid: number) =>
    machine.fs.stat(`/proc/${pid}`).then(
      () => true,
      () => false,
    );

  it('leaves the streams of its source as they were', { timeout: OPERATION }, async () => {
    echo.stdin.write('still here\n');
    expect(String((await echo.stdout[Symbol.asyncIterator]().next()).value)).toBe('still here\n');
  });

  it('has a name, addresses and a clock of its own, and none of the connections', { timeout: BOOT }, async () => {
    const mac = '52:54:00:ab:cd:01';
    await using machine = await restored({
      hostname: 'clone-1',
      networks: [{ type: 'user', mac }],
      vsock: { cid: 77 },
    });
    expect(machine.vsock.cid).toBe(77);
    expect(await read(machine, '/proc/sys/kernel/hostname')).toBe('clone-1');
    expect(await read(machine, '/sys/class/net/eth0/address')).toBe(mac);
    const { stdout } = await machine.exec('date', { args: ['+%s'] });
    expect(Math.abs(Number(stdout) - Date.now() / 1000)).toBeLessThan(60);
    await expect.poll(() => lives(machine, echo.pid), { timeout: OPERATION, interval: 200 }).toBe(false);
    expect(await lives(machine, detached.pid)).toBe(true);
    // The network answers the new address.
    expect(await machine.exec('ping', { args: ['-c', '1', '10.0.2.2'] })).toMatchObject({ code: 0 });
  });

  it('keeps what it is not given', { timeout: OPERATION }, async () => {
    await using machine = await restored();
    expect(await read(machine, '/proc/sys/kernel/hostname')).toBe('tsvisor');
    expect(await read(machine, '/sys/class/net/eth0/address')).toBe('52:54:00:12:34:56');
    expect(machine.vsock.cid).toBe(3);
  });

  it('has random numbers that no other has', { timeout: BOOT }, async () => {
    const numbers: string[] = [];
    for (let i = 0; i < 3; i++) {
      await using machine = await restored();
      numbers.push((await random(machine)).toString('hex'));
    }
    expect(new Set(numbers).size).toBe(3);
  });

  it('takes connections at once, every time', { timeout: BOOT }, async () => {
    for (let i = 0; i < 10; i++) {
      await using machine = await Machine.restore(snapshot);
      await machine.resume();
      await new Agent(() => machine.vsock.connect(1007)).ping();
    }
  });

  it('is saved again before it has heard of anything', { timeout: BOOT }, async () => {
    const again = join(folder, 'again');
    {
      await using machine = await Machine.restore(snapshot);
      await machine.snapshot(again);
    }
    await using machine = await restored({ hostname: 'clone-2' }, again);
    expect(await read(machine, '/proc/sys/kernel/hostname')).toBe('clone-2');
  });

  it('says what it could not be given', { timeout: OPERATION }, async () => {
    await expect(Machine.restore(snapshot, { hostname: 'a b' })).rejects.toMatchObject({ code: 'ERR_USAGE' });
    await expect(Machine.restore(snapshot, { hostname: 'a'.repeat(65) })).rejects.toMatchObject({ code: 'ERR_USAGE' });
    await using machine = await restored();
    await machine.fs.remove('/dev/urandom');
    await machine.fs.mkdir('/dev/urandom');
    await machine.snapshot(join(folder, 'without'));
    await expect(restored({}, join(folder, 'without'))).rejects.toMatchObject({
      code: 'ERR_AGENT',
      message: expect.stringContaining('cannot give the restored guest an identity of its own: /dev/urandom'),
    });
  });
});
