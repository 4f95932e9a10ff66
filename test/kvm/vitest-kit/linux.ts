import { machineTest } from 'tsvisor/vitest';

const test = machineTest({ memory: 64 * 2 ** 20 });

test('uname', async ({ machine, expect }) => {
  const { stdout } = await machine.exec('uname -s; echo kept >/tmp/file');
  expect(stdout).toBe('Linux\n');
});

test('nothing of another test', async ({ machine, expect }) => {
  await expect(machine.fs.stat('/tmp/file')).rejects.toMatchObject({ errno: 'ENOENT' });
});
