import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { debianCloudKernel, withDependencies } from '../support/debian-kernel.js';
import { initramfsWith } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { checkDevicesByAcpi } from './devices-by-acpi.js';

const HOURS = 3_600_000;

describeKvm('Debian’s own cloud kernel', () => {
  test('boots its bzImage to a shell and finds its devices by ACPI', { timeout: 2 * HOURS }, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
    try {
      const { vmlinuz, modules } = debianCloudKernel();
      const needed = withDependencies(modules, ['virtio_mmio', 'virtio_blk', 'virtio-rng', 'virtio_net']);
      const manifest = needed.map(({ name, path }) => `file ${name}.ko 644 ${path}`);
      const insert = needed.map(({ name }) => `busybox insmod /${name}.ko`);
      const initrd = initramfsWith(folder, manifest);
      const { stdout } = await checkDevicesByAcpi(folder, vmlinuz, initrd, insert, ['--memory', '256M']);
      expect(stdout).toMatch(/^Linux .*cloud-amd64.* x86_64/m);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
