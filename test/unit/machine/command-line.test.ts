import { expect, test } from 'vitest';
import { commandLine } from '#dist/machine/command-line.js';
import { resolveConfig } from '#dist/machine/config.js';

const CPUS = /maxcpus=1 noreplace-smp tsvisor\.cpus=4\b/;
const config = { kernel: 'vmlinux', cpus: 4, defaultInit: true };

test('init brings up the vCPUs only where the kernel is interpreted, there are several, and it is known to', () => {
  const line = (changes: object, flavour: 'interpreted' | 'hardware' = 'interpreted') =>
    commandLine(resolveConfig({ ...config, ...changes }), flavour);
  expect(line({})).toMatch(CPUS);
  for (const other of [line({ cpus: 1 }), line({ defaultInit: undefined }), line({}, 'hardware')]) {
    expect(other).not.toMatch(/maxcpus|noreplace-smp|tsvisor\.cpus/);
  }
  expect(line({ append: 'maxcpus=4' })).toMatch(/maxcpus=1 .* maxcpus=4$/);
});

test('a kernel that is interpreted has coarse timers, unless it is the default one', () => {
  const line = (defaultInit: boolean, flavour: 'interpreted' | 'hardware') =>
    commandLine(resolveConfig({ kernel: 'vmlinux', defaultInit }), flavour);
  expect(line(false, 'interpreted')).toContain('highres=off');
  for (const other of [line(true, 'interpreted'), line(false, 'hardware')]) expect(other).not.toContain('highres');
});
