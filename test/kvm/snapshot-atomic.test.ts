import { execFile } from 'node:child_process';
import { mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { COUNTING, countingMachine, countsOn } from '../support/snapshot/counting-guest.js';
import { failureOf } from '../support/snapshot/folder.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const there = temporaryFolder();

describeKvm('a snapshot is there whole or not at all', () => {
  test('what is there already is left as it is', async () => {
    await using machine = await countingMachine();
    await machine.start();
    const taken = join(there, 'taken');
    mkdirSync(taken);
    writeFileSync(join(taken, 'precious'), '');
    writeFileSync(join(there, 'file'), 'precious');
    for (const path of [taken, join(there, 'file')]) {
      const failure = await failureOf(machine.snapshot(path));
      expect(failure).toEqual({ code: 'ERR_SNAPSHOT', message: expect.stringContaining(`${path}: exists already`) });
    }
    const nowhere = join(there, 'none', 'snapshot');
    expect(await failureOf(machine.snapshot(nowhere))).toMatchObject({ code: 'ERR_SNAPSHOT' });
    expect(readdirSync(there).sort()).toEqual(['file', 'taken']);
    expect(readdirSync(taken)).toEqual(['precious']);
    mkdirSync(join(there, 'empty'));
    await machine.snapshot(join(there, 'empty'));
    expect(readdirSync(join(there, 'empty')).sort()).toEqual(['memory', 'state']);
    await countsOn(machine);
  });

  test('of a machine that has ended there is none', async () => {
    await using machine = await countingMachine();
    await machine.start();
    await machine.stop();
    const path = join(there, 'ended');
    expect(await failureOf(machine.snapshot(path))).toMatchObject({ code: 'ERR_MACHINE_STATE' });
    expect(readdirSync(there)).not.toContain('ended');
    expect(readdirSync(there).filter((name) => name.includes('.tmp'))).toEqual([]);
  });

  test('several at a time are taken one after the other', async () => {
    await using machine = await countingMachine();
    await machine.start();
    const names = ['a', 'b', 'c'];
    await Promise.all(names.map((name) => machine.snapshot(join(there, name))));
    for (const name of names) {
      await using restored = await Machine.restore(join(there, name));
      await restored.resume();
      await countsOn(restored);
    }
  });

  test('when the disk is full, wherever: nothing is left, and the machine goes on', async () => {
    const disk = join(there, 'disk');
    mkdirSync(disk);
    const script = 'test/support/snapshot/full-disk.mjs';
    const { stdout } = await promisify(execFile)('unshare', ['-rm', process.execPath, script, COUNTING, disk]);
    const lines = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
    const last = lines.pop();
    expect(lines.at(-1)).toMatchObject({ left: ['snapshot'] });
    expect(lines.length).toBeGreaterThan(4);
    for (const { failure, left } of lines.slice(0, -1)) {
      expect(failure).toEqual({ code: 'ERR_SNAPSHOT', message: expect.stringMatching(/ENOSPC|the disk is full/) });
      expect(left).toEqual([]);
    }
    const [track, full, next] = last.results;
    expect(track).toBe(null);
    expect(full).toMatchObject({ code: 'ERR_SNAPSHOT' });
    expect(next.message).toContain('a differential one needs one before it');
    expect(last.left).toEqual(['base', 'snapshot']);
  });
});
