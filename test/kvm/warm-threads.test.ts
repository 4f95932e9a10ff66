import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { Worker } from 'node:worker_threads';
import { afterAll, expect, test } from 'vitest';
import { Machine, type MachineConfig } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const MiB = 2 ** 20;
const folder = temporaryFolder();

const SPIN = guestProgram('spin: jmp spin');
/** Ends with what a byte of memory was, an I/O port's scratch register added, and leaves both changed. */
const LEAVES_TRACES = guestProgram(`
  mov dx, SERIAL + 7
  in al, dx
  add al, [0x280000]
  mov bl, al
  mov byte ptr [0x280000], 3
  mov al, 4
  out dx, al
  mov dx, SERIAL
  mov al, 'x'
  out dx, al
  mov al, bl
  out DEBUG_EXIT, al`);

/** Threads that this process has started. */
const started: Worker[] = [];
const note = (worker: Worker) => started.push(worker);
process.on('worker', note);
afterAll(() => process.off('worker', note));

async function run(config: Partial<MachineConfig> = {}) {
  await using machine = await Machine.create({ kernel: LEAVES_TRACES, memory: 4 * MiB, ...config });
  await machine.start();
  return { end: await machine.wait(), said: machine.consoleTail(9), exits: (await machine.metrics()).exits.io };
}

/** How many threads that takes beside those that wait already. */
async function threadsOf(use: () => Promise<unknown>): Promise<number> {
  const before = started.length;
  await use();
  return started.length - before;
}

describeKvm('a thread whose machine has been closed', () => {
  test('has the next one, which sees nothing of those before', async () => {
    const first = await run();
    expect(first).toMatchObject({ end: { reason: 'guest-exit', code: 0 }, said: 'x' });
    const others = async () => {
      for (const memory of [4, 4, 6, 8, 4]) expect(await run({ memory: memory * MiB })).toEqual(first);
    };
    expect(await threadsOf(others)).toBe(0);
  });

  test('has the next one whatever its machine was doing', async () => {
    await run();
    const file = join(folder, 'saved');
    const all = async () => {
      const config = { kernel: SPIN, memory: 4 * MiB };
      await (await Machine.create(config)).close(); // never started
      const running = await Machine.create({ ...config, consolePorts: [{ name: 'port' }], rng: true, vsock: true });
      await running.start();
      await running.close();
      const several = await Machine.create({ ...config, cpus: 2 });
      await several.start();
      await several.snapshot(file, { stop: true });
      await several.close();
      const restored = await Machine.restore(file);
      await restored.resume();
      await restored.close();
      expect((await run()).end).toMatchObject({ code: 0 });
    };
    expect(await threadsOf(all)).toBe(0);
  });

  test('has the next one though nobody has read what its machine said', async () => {
    await run();
    const all = async () => {
      for (let i = 0; i < 3; i++) {
        await using machine = await Machine.create({ kernel: LEAVES_TRACES, memory: 4 * MiB });
        void machine.serial;
        await machine.start();
        await machine.wait();
      }
    };
    expect(await threadsOf(all)).toBe(0);
  });

  test('has no other if its machine failed', async () => {
    await run();
    const fail = () => expect(run({ kernel: '/nonexistent' })).rejects.toThrow('no such file');
    expect(await threadsOf(fail)).toBe(0);
    expect(await threadsOf(run)).toBe(1);
  });

  test('has no other if it has run code of its user’s', async () => {
    await run();
    const devices = [{ module: new URL('./modules/marks-thread.js', import.meta.url) }];
    const withDevice = async () => {
      const kernel = guestProgram('mov ebx, 0xd1000000; mov eax, [rbx]; out DEBUG_EXIT, al');
      expect((await run({ kernel, devices })).end).toMatchObject({ reason: 'guest-exit', code: 1 });
    };
    expect(await threadsOf(withDevice)).toBe(0);
    expect(await threadsOf(withDevice)).toBe(1);
    expect(await threadsOf(run)).toBe(1);
  });

  test('is the only one that waits, unless more are asked for', async () => {
    const three = () => Promise.all([run(), run(), run()]);
    await three();
    expect(await threadsOf(run)).toBe(0);
    expect(await threadsOf(three)).toBe(2);
    Machine.keepWarm(0);
    expect(await threadsOf(run)).toBe(1);
    expect(await threadsOf(run)).toBe(1);
    await expect.poll(() => started.every(({ threadId }) => threadId === -1)).toBe(true);
    const before = started.length;
    Machine.keepWarm(2);
    await expect.poll(() => started.length).toBe(before + 2);
  });

  test.each([
    ['that ends', ''],
    ['that exits', 'process.exit(0);'],
  ])('does not keep a program %s', async (_, how) => {
    const program = `
      import { Machine } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url))};
      for (let i = 0; i < 2; i++) {
        const machine = await Machine.create({ kernel: ${JSON.stringify(SPIN)}, memory: ${4 * MiB} });
        await machine.start();
        await machine.close();
      }
      ${how}`;
    await promisify(execFile)(process.execPath, ['--input-type=module', '--eval', program], { timeout: 50_000 });
  });
});
