import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, test } from 'vitest';
import bundle from '#dist/bundle.cjs';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
const require = createRequire(import.meta.url);
let count = 0;

function write(source: string): string {
  const file = join(folder, `bundle-${count++}.cjs`);
  writeFileSync(file, source);
  return file;
}

/** Runs it in a process of its own. @returns what it printed. */
function runAlone(file: string, env: NodeJS.ProcessEnv = {}): string {
  const loader = require.resolve('#dist/bundle.cjs');
  const program = `require(${JSON.stringify(loader)}).run(${JSON.stringify(file)}, require)`;
  const { stdout, stderr } = spawnSync(process.execPath, ['-e', program], {
    encoding: 'utf8',
    env: { ...process.env, ...env },
  });
  expect(stderr).toBe('');
  return stdout;
}

describe('a bundle', () => {
  test('is a CommonJS module', () => {
    const file = write('exports.seen = [__filename, __dirname, require("node:path").sep, module.exports === exports];');
    expect(bundle.run(file, require)).toEqual({ seen: [file, folder, '/', true] });
  });

  test('imports what is outside', async () => {
    const module = join(folder, 'outside.mjs');
    writeFileSync(module, 'export const answer = 42;');
    const { load } = bundle.run(write('exports.load = importModule;'), require) as {
      load(url: string): Promise<object>;
    };
    expect(await load(pathToFileURL(module).href)).toMatchObject({ answer: 42 });
  });

  test('runs the same with a code cache, and with one that V8 refuses', () => {
    const file = write('const twice = (n) => 2 * n; process.stdout.write(String(twice(21)));');
    const cache = `${file}.cache`;
    expect(runAlone(file)).toBe('42');
    expect(existsSync(cache)).toBe(false);
    expect(runAlone(file, { [bundle.WRITE_CACHE]: '1' })).toBe('42');
    const kept = readFileSync(cache);
    expect(runAlone(file)).toBe('42');

    for (const refused of [kept.subarray(0, kept.length >> 1), Buffer.from('not of V8'), Buffer.alloc(0)]) {
      writeFileSync(cache, refused);
      expect(runAlone(file)).toBe('42');
    }
    writeFileSync(cache, kept);
    writeFileSync(file, 'process.stdout.write("another program");');
    expect(runAlone(file)).toBe('another program');
  });
});
