import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { countingMachine, countsOn } from '../support/snapshot/counting-guest.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const there = temporaryFolder();

describeKvm('a machine is saved and restored', () => {
  test('it goes on counting, as the machine that it was taken of does', async () => {
    const folder = join(there, 'one');
    await using machine = await countingMachine();
    await machine.start();
    await countsOn(machine);
    await machine.snapshot(folder);
    expect(readdirSync(folder).sort()).toEqual(['memory', 'state']);
    await countsOn(machine);
    await using restored = await Machine.restore(folder);
    expect(restored.state).toBe('paused');
    await restored.resume();
    await countsOn(restored);
    expect(existsSync(folder)).toBe(true);
  });
});
