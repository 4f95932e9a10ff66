import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
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

  test('resets through the reset register', { timeout: 5 * MINUTES }, async () => {
    const args = ['--initrd', defaultGuest().initrd, '--acpi', 'on', '--append', 'reboot=acpi', '--no-reboot'];
    const { code } = await cli(['run', '--kernel', kernel, ...args], { input: 'busybox reboot -f\n' });
    expect(code).toBe(80);
  });
});
