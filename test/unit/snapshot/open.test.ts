import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  chownSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { beforeEach, describe, expect, test } from 'vitest';
import { OpenSnapshot } from '#dist/snapshot/open.js';
import { expectNoMoreThan, resources } from '../../support/process-resources.js';
import {
  anyState,
  checksumOf,
  failureOf,
  type Json,
  MEMORY,
  sealed,
  writeFolder,
} from '../../support/snapshot/folder.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const there = temporaryFolder();
let number = 0;
let folder: string;
beforeEach(() => {
  folder = writeFolder(join(there, String(number++)), anyState());
});

/** A snapshot that is based on another. */
function based(on: string, parent: Json = {}, size = MEMORY): string {
  const child = join(there, String(number++));
  const { id } = anyState();
  const whole = { path: `../${on.split('/').at(-1)}`, id, checksum: checksumOf(on), ...parent };
  return writeFolder(child, anyState({ memory: { size, parent: whole, extents: [[1, 2]] } }), size);
}

async function refused(path = folder): Promise<string> {
  const before = resources();
  const { code, message } = await failureOf(OpenSnapshot.open(path));
  expect(code).toBe('ERR_SNAPSHOT');
  expect(message).not.toContain('\n');
  await expectNoMoreThan(before);
  return message;
}

test('a snapshot is opened: its state and its memory', async () => {
  const before = resources();
  await using snapshot = await OpenSnapshot.open(folder);
  expect(snapshot.state.id).toBe(anyState().id);
  expect(snapshot.path).toBe(folder);
  expect(snapshot.layers).toEqual([{ fd: expect.any(Number), extents: undefined }]);
  await snapshot[Symbol.asyncDispose]();
  await expectNoMoreThan(before);
});

describe('what is not a snapshot is refused by name', () => {
  test('no folder, a file, an empty folder', async () => {
    expect(await refused(join(there, 'none'))).toBe(
      `${join(there, 'none', 'state')}: there is no such file; a snapshot is a folder that has it`,
    );
    expect(await refused(join(folder, 'state'))).toContain('ENOTDIR');
    rmSync(join(folder, 'memory'));
    expect(await refused()).toContain(`${join(folder, 'memory')}: there is no such file`);
    rmSync(join(folder, 'state'));
    expect(await refused()).toContain(`${join(folder, 'state')}: there is no such file`);
  });

  for (const name of ['state', 'memory']) {
    const path = () => join(folder, name);

    test(`${name} is a link`, async () => {
      renameSync(path(), `${path()}.real`);
      symlinkSync(`${path()}.real`, path());
      expect(await refused()).toBe(`${path()}: not a regular file`);
    });

    test(`${name} is a pipe, a folder, a device: nothing waits for it`, async () => {
      for (const make of ['mkfifo', 'mkdir']) {
        rmSync(path());
        execFileSync(make, [path()]);
        expect(await refused()).toBe(`${path()}: not a regular file`);
        rmSync(path(), { recursive: true });
        symlinkSync('/dev/zero', path());
        expect(await refused()).toBe(`${path()}: not a regular file`);
      }
    });
  }

  test('a state that is too long to be one is not read', async () => {
    truncateSync(join(folder, 'state'), 2 ** 40);
    expect(await refused()).toBe(`${join(folder, 'state')}: damaged: it has ${2 ** 40} bytes`);
  });

  test('a state that is cut, or changed', async () => {
    const path = join(folder, 'state');
    const bytes = readFileSync(path);
    truncateSync(path, bytes.length - 1);
    expect(await refused()).toBe(`${path}: damaged: its checksum is wrong`);
    bytes[100] = (bytes[100] as number) ^ 1;
    writeFileSync(path, bytes);
    await refused();
  });

  test('a state of another version', async () => {
    writeFileSync(join(folder, 'state'), sealed(JSON.stringify(anyState()), 7));
    expect(await refused()).toContain('a snapshot of version 7; this tsvisor knows version 1');
  });

  for (const size of [0, MEMORY - 4096, MEMORY - 1, MEMORY + 1, 2 ** 40]) {
    test(`a memory of ${size} bytes`, async () => {
      truncateSync(join(folder, 'memory'), size);
      expect(await refused()).toContain(`memory: damaged: it has ${size} bytes instead of ${MEMORY}`);
    });
  }

  test('a memory that others may write', async () => {
    for (const mode of [0o620, 0o602, 0o666]) {
      chmodSync(join(folder, 'memory'), mode);
      expect(await refused()).toContain('memory: other users may change it');
    }
  });

  test.runIf(process.geteuid?.() === 0)('a memory of another user', async () => {
    chownSync(join(folder, 'memory'), 12345, 12345);
    expect(await refused()).toContain('memory: it belongs to another user');
  });
});

describe('a snapshot that is based on another', () => {
  test('is opened with it, the oldest first', async () => {
    const child = based(based(folder));
    await using snapshot = await OpenSnapshot.open(child);
    expect(snapshot.layers.map(({ extents }) => extents)).toEqual([undefined, [[1, 2]], [[1, 2]]]);
  });

  test('is refused when that is not the one', async () => {
    const message = `${folder}: not the snapshot that`;
    expect(await refused(based(folder, { id: 'f'.repeat(32) }))).toContain(message);
    expect(await refused(based(folder, { checksum: 'f'.repeat(64) }))).toContain(message);
    expect(await refused(based(folder, {}, 2 * MEMORY))).toContain(message);
    expect(await refused(based(folder, { path: '../none' }))).toContain(join(there, 'none', 'state'));
    expect(await refused(based(folder, { path: '/dev' }))).toContain('/dev/state: there is no such file');
    const child = based(folder);
    writeFolder(folder, anyState({ created: 'later' }));
    expect(await refused(child)).toContain(message);
  });

  test('32 on each other and no more', async () => {
    let last = folder;
    for (let depth = 1; depth < 32; depth++) last = based(last);
    {
      await using snapshot = await OpenSnapshot.open(last);
      expect(snapshot.layers).toHaveLength(32);
    }
    expect(await refused(based(last))).toContain('more than 32 snapshots, each based on another; take a full one');
  });
});
