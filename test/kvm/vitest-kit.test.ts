import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { describeKvm } from '../support/kvm.js';

/** Runs vitest on a file of vitest-kit/, perhaps where there is no KVM. */
function vitest(file: string, { kvm = true } = {}) {
  const command = ['npx', '--no-install', 'vitest', 'run', '--root=test/kvm/vitest-kit', '--reporter=default', file];
  // In a mount namespace of its own /dev/kvm is another file; needs root.
  const hide = ['unshare', '--mount', 'sh', '-c', 'mount --bind /dev/null /dev/kvm && exec "$@"', 'sh'];
  const [program, ...args] = kvm || !existsSync('/dev/kvm') ? command : [...hide, ...command];
  const env = { ...process.env, NO_COLOR: '1' };
  const { status, stdout, stderr } = spawnSync(program as string, args, { encoding: 'utf8', timeout: 290_000, env });
  return { status, output: stdout + stderr };
}

describeKvm('machineTest', () => {
  test('gives each test a fresh machine', () => {
    const { status, output } = vitest('passing');
    expect(output).toMatch(/Tests {2}6 passed \(6\)/);
    expect(status).toBe(0);
  });

  test('boots Linux and waits for its agent', () => {
    const { status, output } = vitest('linux');
    expect(output).toMatch(/Tests {2}2 passed \(2\)/);
    expect(status).toBe(0);
  });

  test('shows the console of a test that failed, and why there is no machine', () => {
    const { status, output } = vitest('failing');
    expect(output).toMatch(/failing\.ts > fails\nThe guest's console:\na line of the guest\n/);
    expect(output).toMatch(/FAIL .* has no kernel\n\w*Error: .*\/nowhere\/vmlinux/);
    expect(output).toMatch(/Tests {2}2 failed \(2\)/);
    expect(status).toBe(1);
  });
});

describe('without KVM', () => {
  test('tests are skipped, and the reason is told', () => {
    const { status, output } = vitest('passing', { kvm: false });
    expect(output.match(/^Tests with a machine are skipped: \/dev\/kvm .+$/gm)).toHaveLength(1);
    expect(output).toMatch(/Tests {2}1 passed \| 5 skipped \(6\)/);
    expect(status).toBe(0);
  });
});
