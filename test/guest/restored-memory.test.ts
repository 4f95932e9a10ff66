import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Machine, type PageSourceConfig } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const there = temporaryFolder();
const BOOT = 600_000;
const OPERATION = 300_000;
const CHECK = 'md5sum -c /tmp/sums';

describeKvm('the memory of a restored Linux guest', () => {
  const snapshot = join(there, 'snapshot');
  const differential = join(there, 'differential');
  const module = new URL('../kvm/modules/pages.js', import.meta.url);
  const pages = (options: object, rest: Partial<PageSourceConfig> = {}): PageSourceConfig => ({
    module,
    options: { file: join(snapshot, 'memory'), ...options },
    ...rest,
  });
  const machines: Machine[] = [];
  const running = async (machine: Promise<Machine>) => {
    const restored = await machine;
    machines.push(restored);
    await restored.resume();
    return restored;
  };

  beforeAll(async () => {
    await using machine = await Machine.create();
    await machine.start();
    await machine.ready({ timeout: BOOT });
    await machine.exec('seq 1 30000 > /tmp/one && md5sum /tmp/one > /tmp/sums', { timeout: OPERATION });
    await machine.snapshot(snapshot, { track: true });
    await machine.exec('seq 2 10000 > /tmp/two && md5sum /tmp/two >> /tmp/sums', { timeout: OPERATION });
    await machine.snapshot(differential, { differential: true, stop: true });
  }, 2 * BOOT);
  afterAll(() => Promise.all(machines.map((machine) => machine.close())));

  it('comes from a slow page source, also what devices touch', { timeout: OPERATION }, async () => {
    const machine = await running(Machine.restore(snapshot, { pages: pages({ ms: 3 }) }));
    expect((await machine.exec(CHECK)).stdout).toBe('/tmp/one: OK\n');
    await machine.exec('seq 1 10000 > /tmp/mine && md5sum /tmp/mine >> /tmp/sums');
    const again = join(there, 'again'); // what the guest has not touched is fetched
    await machine.snapshot(again, { stop: true });
    const restored = await running(Machine.restore(again, { verify: true }));
    expect((await restored.exec(CHECK)).stdout).toBe('/tmp/one: OK\n/tmp/mine: OK\n');
  });

  it.each([
    ['file, brought in before it is touched', { prefetch: true }],
    ['page source, asked for all of it', { prefetch: true, pages: pages({}) }],
  ])('comes from a %s', { timeout: OPERATION }, async (_, options) => {
    const machine = await running(Machine.restore(snapshot, options));
    expect((await machine.exec(CHECK)).stdout).toBe('/tmp/one: OK\n');
  });

  it('a source that fails while the guest works is why that fails', { timeout: OPERATION }, async () => {
    const machine = await running(
      Machine.restore(snapshot, { pages: pages({ fail: 'rejects', after: 60 }, { timeout: 20_000 }) }),
    );
    await expect(machine.exec(CHECK)).rejects.toMatchObject({
      code: 'ERR_SNAPSHOT',
      message: 'snapshot: the page source failed: the disk is gone',
    });
    expect(await machine.wait()).toMatchObject({ reason: 'page-source-failure' });
  });

  it('verify finds a flipped bit in each layer', { timeout: OPERATION }, async () => {
    const machine = await running(Machine.restore(differential, { verify: true }));
    expect((await machine.exec(CHECK)).stdout).toBe('/tmp/one: OK\n/tmp/two: OK\n');
    for (const folder of [snapshot, differential]) {
      const path = join(folder, 'memory');
      const file = await open(path, 'r+');
      const byte = Buffer.alloc(1);
      const at = 21 * 2 ** 20 + 5;
      await file.read(byte, 0, 1, at);
      await file.write(Buffer.of((byte[0] as number) ^ 1), 0, 1, at);
      await expect(Machine.restore(differential, { verify: true })).rejects.toMatchObject({
        code: 'ERR_SNAPSHOT',
        message: `${path}: damaged: the checksum of bytes ${21 * 2 ** 20} to ${22 * 2 ** 20 - 1} is wrong; take the snapshot again`,
      });
      await file.write(byte, 0, 1, at);
      await file.close();
    }
    await using whole = await Machine.restore(differential, { verify: true });
    expect(whole.state).toBe('paused');
  });
});
