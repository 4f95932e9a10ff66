import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { Machine, type MachineConfig, SharedThread } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { talkingGuest } from '../support/talking-guest.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const memory = 5 * 2 ** 20; // nothing else has this length
const folder = temporaryFolder();
/** Does port I/O for ever. */
const BUSY = guestProgram('again: in al, 0x80; jmp again');
/** Prints 100,000 bytes, then ends. */
const TALKS = talkingGuest(100_000, 5);

const exits = async (machine: Machine) => (await machine.metrics()).exits.io ?? 0;
const moreThan = (machine: Machine, count: number) =>
  expect.poll(() => exits(machine), { timeout: 60_000 }).toBeGreaterThan(count);

describeKvm('machines on a thread that they share', () => {
  test('come and go while others run', { timeout: 120_000 }, async () => {
    await using thread = new SharedThread();
    await using busy = await Machine.create({ kernel: BUSY, memory }, { thread });
    await busy.start();
    const end = guestProgram('mov al, 3; out DEBUG_EXIT, al');
    for (let round = 0; round < 10; round++) {
      const before = await exits(busy);
      await using machine = await Machine.create({ kernel: end, memory }, { thread });
      expect(thread.machines).toBe(2);
      await machine.start();
      expect(await machine.wait()).toMatchObject({ code: 3 });
      await moreThan(busy, before);
    }
    await expect(Machine.create({ kernel: '/nonexistent', memory }, { thread })).rejects.toThrow('no such file');
    await expect.poll(() => thread.machines).toBe(1);
    await moreThan(busy, await exits(busy));
  });

  test('do not wait for what another has said and nobody reads', { timeout: 120_000 }, async () => {
    await using thread = new SharedThread();
    await using busy = await Machine.create({ kernel: BUSY, memory }, { thread });
    await using talks = await Machine.create({ kernel: TALKS, memory }, { thread });
    const { serial } = talks; // from now on its output waits for its reader
    await Promise.all([busy.start(), talks.start()]);
    await using unheard = await Machine.create({ kernel: TALKS, memory }, { thread });
    void unheard.serial;
    await unheard.start();
    await moreThan(busy, await exits(busy));
    await unheard.close(); // though it is in the middle of a word
    expect((await text(serial)).length).toBe(100_000);
    expect(await talks.wait()).toMatchObject({ code: 5 });
    await moreThan(busy, await exits(busy));
  });

  test('end with it', async () => {
    const thread = new SharedThread();
    const machines = await Promise.all([1, 2, 3].map(() => Machine.create({ kernel: BUSY, memory }, { thread })));
    await machines[0]?.start();
    await thread.close();
    for (const machine of machines) {
      expect(await machine.wait()).toMatchObject({ reason: 'stopped' });
      await machine.close();
    }
    await expect(Machine.create({ kernel: BUSY, memory }, { thread })).rejects.toMatchObject({
      code: 'ERR_MACHINE_CRASHED',
    });
  });

  test('are given up with it while they are made', async () => {
    const thread = new SharedThread();
    const devices = [{ module: new URL('./modules/never-loads.js', import.meta.url) }];
    const never = Machine.create({ kernel: BUSY, memory, devices }, { thread });
    const refused = expect(never).rejects.toMatchObject({ code: 'ERR_MACHINE_CRASHED' });
    await using machine = await Machine.create({ kernel: BUSY, memory }, { thread });
    await machine.start();
    await moreThan(machine, 0);
    await thread.close();
    await refused;
  });

  test('die with it', async () => {
    await using thread = new SharedThread();
    const module = new URL('./modules/dies.js', import.meta.url);
    const kernel = guestProgram('mov ebx, 0xd1000000; mov dword ptr [rbx], 0; hang: jmp hang');
    await using bystander = await Machine.create({ kernel: BUSY, memory }, { thread });
    await bystander.start();
    const config: MachineConfig = { kernel, memory, devices: [{ module }] };
    await using culprit = await Machine.create(config, { thread });
    await culprit.start();
    const died = { code: 'ERR_MACHINE_CRASHED', message: 'the machine thread died: it exited with code 3' };
    await expect(culprit.wait()).rejects.toMatchObject(died);
    await expect(bystander.wait()).rejects.toMatchObject(died);
    expect(thread.machines).toBe(0);
  });

  test('get their pages from a file', async () => {
    await using thread = new SharedThread();
    await using machine = await Machine.create({ kernel: BUSY, memory }, { thread });
    await machine.start();
    const path = join(mkdtempSync(join(folder, 'saved-')), 'snapshot');
    await machine.snapshot(path);
    const pages = { module: new URL('./modules/pages.js', import.meta.url) };
    await expect(Machine.restore(path, { thread, pages })).rejects.toMatchObject({ code: 'ERR_USAGE' });
    await using clone = await Machine.restore(path, { thread });
    const before = await exits(clone);
    await clone.resume();
    await moreThan(clone, before);
  });

  test('leave nothing on it', { timeout: 120_000 }, async () => {
    await using thread = new SharedThread();
    const some = async () => {
      const machines = await Promise.all(
        Array.from({ length: 10 }, () =>
          Machine.create({ kernel: BUSY, memory, consolePorts: [{ name: 'port' }], rng: true }, { thread }),
        ),
      );
      await Promise.all(machines.map((machine) => machine.start()));
      await Promise.all(machines.map((machine) => machine.close()));
    };
    await some();
    await some();
    const before = resources();
    for (let round = 0; round < 5; round++) await some();
    await expectNoMoreThan(before);
    const maps = readFileSync('/proc/self/maps', 'latin1').split('\n');
    expect(maps.filter((line) => line.includes('kvm-vcpu'))).toEqual([]);
    const lengthOf = (line: string) => {
      const [from = 0, to = 0] = (line.split(' ')[0] ?? '').split('-').map((address) => Number.parseInt(address, 16));
      return to - from;
    };
    expect(maps.filter((line) => lengthOf(line) === memory)).toEqual([]);
  });

  test.each([
    ['without a machine', ''],
    ['whose machines have ended', 'await using machine = await make(); await machine.start(); await machine.stop();'],
    ['when the program exits', 'const machine = await make(); await machine.start(); process.exit(0);'],
  ])('does not keep the process: one %s', async (_, what) => {
    const program = `
      import { Machine, SharedThread } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url))};
      const thread = new SharedThread();
      const make = () => Machine.create({ kernel: ${JSON.stringify(BUSY)}, memory: ${memory} }, { thread });
      ${what}
      console.log('done');`.replace('await using machine', 'const machine');
    const args = ['--input-type=module', '--eval', program];
    await promisify(execFile)(process.execPath, args, { timeout: 50_000 });
  });
});
