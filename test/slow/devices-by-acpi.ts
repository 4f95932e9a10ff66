import { createHash, randomBytes } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'vitest';
import { type CliResult, cli } from '../support/cli.js';

/** Lines that begin with a name, so that what is checked is not what was typed. */
const SCRIPT = [
  'uname -a',
  'echo shell $((40+2))',
  'echo disk $(sha256sum </dev/vda)',
  'echo random $(head -c 8 /dev/hwrng | hexdump -e \'8/1 "%02x"\')',
  'ifconfig eth0 10.0.2.15',
  'ping -c 1 -W 120 10.0.2.2',
  'echo clock $(cat /sys/class/rtc/rtc0/name)',
  'cat /proc/interrupts',
  'dmesg | grep -E "ACPI|PCI|pnp|rtc_cmos|ttyS0|i8042"',
  'busybox poweroff -f', // by the kernel, which uses the sleep control register
];

/**
 * Boots a kernel with a disk, a network and the entropy device, all to be found by ACPI alone, and checks that each
 * works with its interrupt, that Linux has no complaint about the tables, and that it powers off by ACPI.
 * @param folder for what is made here
 * @param before lines for the shell
 * @param more arguments for `tsvisor run`
 */
export async function checkDevicesByAcpi(
  folder: string,
  kernel: string,
  initrd: string,
  before: readonly string[] = [],
  more: readonly string[] = [],
): Promise<CliResult> {
  const disk = join(folder, 'disk');
  const content = randomBytes(64 * 1024);
  writeFileSync(disk, content);
  const stats = join(folder, 'stats.json');
  const devices = ['--acpi', 'on', '--drive', disk, '--net', 'user', '--rng'];
  const args = ['run', '--kernel', kernel, '--initrd', initrd, ...devices, '--stats', stats, ...more];
  const result = await cli(args, { input: `${[...before, ...SCRIPT].join('\n')}\n` });
  const { code, stdout, stderr } = result;
  const { phases, milestones, exits, assists, end } = JSON.parse(readFileSync(stats, 'utf8'));
  // For the person who asked for this run.
  process.stdout.write(`${stdout}\n${JSON.stringify({ phases, milestones, exits, assists, end }, null, 2)}\n`);
  expect(stderr).toBe('');
  expect(stdout).toMatch(/^shell 42\r$/m);
  expect(stdout).toContain(`\ndisk ${createHash('sha256').update(content).digest('hex')} -\r`);
  expect(stdout).toMatch(/^random [0-9a-f]{16}\r$/m);
  expect(stdout).toMatch(/^1 packets transmitted, 1 packets received/m);
  expect(stdout).toMatch(/^clock rtc_cmos 00:00\r$/m);
  expect(stdout).toMatch(/\d+: +[1-9]\d* +IO-APIC +4-edge +ttyS0/);
  for (const pin of [5, 6, 7]) {
    expect(stdout).toMatch(new RegExp(`\\d+: +[1-9]\\d* +IO-APIC +${pin}-fasteoi +virtio\\d`));
  }
  expect(stdout).toMatch(/ACPI: 1 ACPI AML tables successfully acquired and loaded/);
  expect(stdout).toMatch(/ACPI: PM: \(supports S0 S5\)/);
  expect(stdout).toMatch(/pnp: PnP ACPI: found 2 devices/);
  expect(stdout).not.toMatch(/(ACPI|pnp).*(error|warning|firmware bug|invalid|fail)/i);
  expect(end).toMatchObject({ reason: 'guest-shutdown' });
  expect(code).toBe(0);
  return result;
}
