import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();

/** The files under a folder with their text. */
function contents(root: string): Record<string, string> {
  const names = readdirSync(root, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.md'));
  return Object.fromEntries(names.sort().map((name) => [name, readFileSync(join(root, name), 'utf8')]));
}

test('docs/api is what `npm run docs` makes of the types, and every public thing has a docstring', () => {
  const { status, stdout, stderr } = spawnSync('npm', ['run', 'docs', '--', '--out', folder], { encoding: 'utf8' });
  expect({ status, output: status === 0 ? '' : stdout + stderr }).toEqual({ status: 0, output: '' });
  expect(contents('docs/api'), 'run `npm run docs` and commit docs/api').toEqual(contents(folder));
});
