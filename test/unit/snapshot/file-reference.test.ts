import { execFileSync } from 'node:child_process';
import { appendFileSync, mkdirSync, rmSync, symlinkSync, utimesSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeEach, expect, test } from 'vitest';
import { isUnchanged, referenceTo } from '#dist/snapshot/file-reference.js';
import type { FileReference } from '#dist/snapshot/format.js';
import { resources } from '../../support/process-resources.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const there = temporaryFolder();
const path = join(there, 'file');
let reference: FileReference;
beforeEach(() => {
  rmSync(path, { recursive: true, force: true });
  writeFileSync(path, 'contents');
  reference = referenceTo(path);
});

test('a file that nobody touched is unchanged, and no descriptor is left', () => {
  const before = resources().descriptors;
  for (const size of [0, 1, 4095, 4096, 4097, 131_071, 131_072, 131_073, 1_000_001]) {
    writeFileSync(path, Buffer.alloc(size, 7));
    expect(isUnchanged(referenceTo(path)), String(size)).toBe(true);
  }
  expect(resources().descriptors).toBe(before);
});

test('a relative path is kept as an absolute one', () => {
  expect(referenceTo('package.json').path).toBe(join(process.cwd(), 'package.json'));
});

const replace = (make: () => void) => () => {
  rmSync(path);
  make();
};
const wrongs: [string, () => void][] = [
  ['written', () => writeFileSync(path, 'contentz')],
  ['appended to', () => appendFileSync(path, 'x')],
  ['touched', () => utimesSync(path, 1, 1)],
  ['replaced by a copy', replace(() => writeFileSync(path, 'contents'))],
  ['removed', replace(() => {})],
  ['a folder now', replace(() => mkdirSync(path))],
  ['a pipe now', replace(() => execFileSync('mkfifo', [path]))],
  ['a link to something else', replace(() => symlinkSync('/etc/hostname', path))],
];
for (const [what, change] of wrongs) {
  test(`a file that is ${what} is changed`, () => {
    expect(isUnchanged(reference)).toBe(true);
    change();
    expect(isUnchanged(reference)).toBe(false);
  });
}

test('whoever does not know what is in a file cannot refer to it, though he knows all else', () => {
  expect(isUnchanged({ ...reference, contents: '0'.repeat(64) })).toBe(false);
  for (const name of ['device', 'inode', 'size', 'modifiedNs', 'changedNs'] as const) {
    expect(isUnchanged({ ...reference, [name]: '1' }), name).toBe(false);
  }
});

test('the sample has the beginning, the end and what is between', () => {
  const size = 10_000_000;
  const samples = new Set<string>();
  for (const at of [-1, 0, size - 1, Math.floor(((size - 4096) / 31) * 15) + 5]) {
    const bytes = Buffer.alloc(size);
    if (at >= 0) bytes[at] = 1;
    writeFileSync(path, bytes);
    samples.add(referenceTo(path).contents);
  }
  expect(samples.size).toBe(4);
});

test('a folder, a pipe or a device is nothing to refer to', () => {
  execFileSync('mkfifo', [`${path}.pipe`]);
  for (const other of [there, `${path}.pipe`, '/dev/zero', join(there, 'none')]) {
    expect(() => referenceTo(other)).toThrow();
  }
});
