import { machineTest } from 'tsvisor/vitest';
import { test } from './machines.js';

test('fails', ({ machine, expect }) => {
  expect(machine.state).toBe('something else');
});

machineTest({ kernel: '/nowhere/vmlinux' })('has no kernel', ({ machine, expect }) => {
  expect(machine).toBe('never');
});
