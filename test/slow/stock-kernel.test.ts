import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { cli } from '../support/cli.js';
import { debianCloudKernel } from '../support/debian-kernel.js';
import { initramfsWith } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';

const HOURS = 3_600_000;

/** Each after those it needs. */
const MODULES = ['virtio', 'virtio_ring', 'virtio_mmio', 'virtio-rng'];

describeKvm('Debian’s own cloud kernel', () => {
  test('boots its bzImage to a shell, finds its devices by ACPI and powers off', { timeout: 2 * HOURS }, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
    try {
      const { vmlinuz, modules } = debianCloudKernel();
      const manifest = MODULES.map((name) => `file ${name}.ko 644 ${modules.get(`${name}.ko`)}`);
      const initrd = initramfsWith(folder, manifest);
      const stats = join(folder, 'stats.json');
      const args = ['run', '--kernel', vmlinuz, '--initrd', initrd, '--memory', '256M', '--acpi', 'on', '--rng'];
      const script = [
        'uname -a',
        'echo shell-$((40+2))',
        ...MODULES.map((name) => `busybox insmod /${name}.ko`),
        'ls /sys/bus/virtio/devices',
        'head -c 8 /dev/hwrng | hexdump -e \'8/1 "%02x" "-random\\n"\'',
        'cat /proc/interrupts',
        'dmesg | grep -E "ACPI|pnp|rtc_cmos|ttyS|i8042|clocksource|APIC"',
        'busybox poweroff -f', // by the kernel, which uses the sleep control register
      ];
      const { code, stdout, stderr } = await cli([...args, '--stats', stats], { input: `${script.join('\n')}\n` });
      const { phases, milestones, exits, assists, end } = JSON.parse(readFileSync(stats, 'utf8'));
      // For the person who asked for this run.
      process.stdout.write(`${stdout}\n${JSON.stringify({ phases, milestones, exits, assists }, null, 2)}\n`);
      expect(stderr).toBe('');
      expect(stdout).toMatch(/^Linux .*cloud-amd64.* x86_64/m);
      expect(stdout).toMatch(/^shell-42\r$/m);
      expect(stdout).toMatch(/^virtio0\r$/m);
      expect(stdout).toMatch(/^[0-9a-f]{16}-random\r$/m);
      expect(stdout).not.toMatch(/ACPI.*(error|warning|firmware bug)/i);
      expect(end).toMatchObject({ reason: 'guest-shutdown' });
      expect(code).toBe(0);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
