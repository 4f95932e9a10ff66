import { execFile } from 'node:child_process';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();

describeKvm('the sandbox example', () => {
  test('runs scripts, and is none the worse for what they do', { timeout: 400_000 }, async () => {
    const scripts = {
      'good.sh': 'id -u; echo 42 > answer; exit 3',
      'endless.sh': 'while :; do :; done',
      'greedy.sh': 'head -c 3000000 /dev/zero > much',
    };
    const paths = Object.entries(scripts).map(([name, text]) => {
      writeFileSync(join(folder, name), text);
      return join(folder, name);
    });
    const results = join(folder, 'results');
    const { stdout } = await promisify(execFile)(process.execPath, [
      'test/examples/sandbox/main.js',
      results,
      ...paths,
    ]);
    const lines = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
    const by = Object.fromEntries(lines.map(({ script, ...result }) => [script, result]));
    expect(by['good.sh']).toEqual({ code: 3, signal: null, stdout: '65534\n', stderr: '', files: 1, bytes: 3 });
    expect(readFileSync(join(results, 'good.sh/answer'), 'utf8')).toBe('42\n');
    expect(by['endless.sh']).toEqual({ error: 'ERR_TIMEOUT' });
    expect(by['greedy.sh']).toEqual({ error: 'ERR_GUEST_FILE' });
    expect(existsSync(join(results, 'greedy.sh/much'))).toBe(false);
  });
});
