import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import { cli } from '../support/cli.js';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { checkDevicesByAcpi } from './devices-by-acpi.js';

const MINUTES = 60_000;

describeKvm('a kernel that knows the machine by ACPI alone', () => {
  let folder: string;
  let kernel: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
    kernel = execFileSync('guest-images/build-kernel.sh', ['--flavour', 'tiny-acpi'], { encoding: 'utf8' }).trim();
  }, 30 * MINUTES);
  afterAll(() => rmSync(folder, { recursive: true }));

  test('finds its devices and their interrupts, and powers off', { timeout: 5 * MINUTES }, async () => {
    await checkDevicesByAcpi(folder, kernel, defaultGuest().initrd);
  });

  test('hears that it was restored, and seeds its random numbers anew', { timeout: 15 * MINUTES }, async () => {
    const snapshot = join(folder, 'snapshot');
    const fork = 'crng reseeded due to virtual machine fork';
    {
      await using machine = await Machine.create({ kernel, initrd: defaultGuest().initrd, acpi: 'on', agent: true });
      await machine.start();
      await machine.ready({ timeout: 10 * MINUTES });
      expect((await machine.exec('dmesg')).stdout).not.toContain(fork);
      await machine.snapshot(snapshot);
    }
    const numbers = [];
    for (let i = 0; i < 2; i++) {
      await using machine = await Machine.restore(snapshot);
      await machine.resume();
      numbers.push((await machine.exec('head', { args: ['-c', '16', '/dev/urandom'], encoding: 'buffer' })).stdout);
      expect((await machine.exec('dmesg')).stdout.split(fork)).toHaveLength(2);
      expect((await machine.exec('cat', { args: ['/proc/interrupts'] })).stdout).toMatch(/\b1 .*ACPI:Ged$/m);
    }
    expect(numbers[0]).not.toEqual(numbers[1]);
  });

  test('resets through the reset register', { timeout: 5 * MINUTES }, async () => {
    const args = ['--initrd', defaultGuest().initrd, '--acpi', 'on', '--append', 'reboot=acpi', '--no-reboot'];
    const { code } = await cli(['run', '--kernel', kernel, ...args], { input: 'busybox reboot -f\n' });
    expect(code).toBe(80);
  });
});
