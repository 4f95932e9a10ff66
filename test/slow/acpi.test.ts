import { execFileSync } from 'node:child_process';
import { beforeAll, expect, test } from 'vitest';
import { cli } from '../support/cli.js';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';

const MINUTES = 60_000;

describeKvm('a kernel that knows the machine by ACPI alone', () => {
  let kernel: string;
  beforeAll(() => {
    kernel = execFileSync('guest-images/build-kernel.sh', ['--flavour', 'tiny-acpi'], { encoding: 'utf8' }).trim();
  }, 30 * MINUTES);

  const run = (append: string, script: string[], ...more: string[]) => {
    const args = ['run', '--kernel', kernel, '--initrd', defaultGuest().initrd, '--acpi', 'on', '--append', append];
    return cli([...args, ...more], { input: `${script.join('\n')}\n` });
  };

  test('has no complaint, gets its interrupts and devices, and powers off', { timeout: 5 * MINUTES }, async () => {
    const script = [
      'dmesg | grep -E "ACPI|PCI|pnp|rtc_cmos|ttyS0"',
      'cat /proc/interrupts',
      'head -c 8 /dev/hwrng | hexdump -e \'8/1 "%02x" "-random\\n"\'',
      'cat /sys/class/rtc/rtc0/name',
      'busybox poweroff -f', // by the kernel, which uses the sleep control register
    ];
    const { code, stdout, stderr } = await run('', script, '--rng');
    expect(stderr).toBe('');
    expect(stdout).toMatch(/ACPI: 1 ACPI AML tables successfully acquired and loaded/);
    expect(stdout).toMatch(/ACPI: PM: \(supports S0 S5\)/);
    expect(stdout).toMatch(/pnp: PnP ACPI: found 2 devices/);
    expect(stdout).not.toMatch(/(ACPI|pnp).*(error|warning|firmware bug|invalid|fail)/i);
    expect(stdout).toMatch(/\d+: +[1-9]\d* +IO-APIC +4-edge +ttyS0/);
    expect(stdout).toMatch(/\d+: +[1-9]\d* +IO-APIC +5-fasteoi +virtio0/);
    expect(stdout).toMatch(/^[0-9a-f]{16}-random\r$/m);
    expect(stdout).toMatch(/^rtc_cmos 00:00\r$/m);
    expect(code).toBe(0);
  });

  test('resets through the reset register', { timeout: 5 * MINUTES }, async () => {
    const { code } = await run('reboot=acpi', ['busybox reboot -f'], '--no-reboot');
    expect(code).toBe(80);
  });
});
