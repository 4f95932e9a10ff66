import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { cli } from '../support/cli.js';
import { debianCloudKernel } from '../support/debian-kernel.js';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';

const HOURS = 3_600_000;

describeKvm('Debian’s own cloud kernel', () => {
  test('boots its bzImage to a shell with no kernel argument of ours', { timeout: 2 * HOURS }, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
    try {
      const stats = join(folder, 'stats.json');
      const args = ['run', '--kernel', debianCloudKernel(), '--initrd', defaultGuest().initrd, '--memory', '256M'];
      const input = 'uname -a; dmesg | tail -n 3; echo shell-$((40+2))\npoweroff\n';
      const { code, stdout, stderr } = await cli([...args, '--stats', stats], { input });
      const { phases, milestones, exits, assists } = JSON.parse(readFileSync(stats, 'utf8'));
      // For the person who asked for this run.
      process.stdout.write(`${stdout}\n${JSON.stringify({ phases, milestones, exits, assists }, null, 2)}\n`);
      expect(stderr).toBe('');
      expect(stdout).toMatch(/^Linux .*cloud-amd64.* x86_64/m);
      expect(stdout).toMatch(/^shell-42\r$/m);
      expect(code).toBe(0);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
