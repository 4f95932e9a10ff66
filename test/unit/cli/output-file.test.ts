import {
  closeSync,
  lstatSync,
  openSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { OutputFile } from '#dist/cli/output-file.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();
const isLink = (path: string) => lstatSync(path).isSymbolicLink();

test('what /dev/stderr and the like lead to is added to, also if it is a regular file, and the link stays', () => {
  const log = join(folder, 'log');
  const fd = openSync(log, 'w');
  const link = `/proc/self/fd/${fd}`;
  writeSync(fd, 'before\n');
  new OutputFile('stats', link).commit('statistics\n');
  expect(isLink(link)).toBe(true);
  closeSync(fd);
  expect(readFileSync(log, 'utf8')).toBe('before\nstatistics\n');
});

test('the file that another link leads to is replaced', () => {
  const file = join(folder, 'file');
  const link = join(folder, 'link');
  writeFileSync(file, 'old and longer');
  symlinkSync(file, link);
  new OutputFile('stats', link).commit('new');
  expect(isLink(link)).toBe(true);
  expect(readFileSync(file, 'utf8')).toBe('new');
  expect(readdirSync(folder).filter((name) => name.endsWith('.tmp'))).toEqual([]);
});
