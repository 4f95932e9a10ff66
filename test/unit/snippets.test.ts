import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { describe, expect, test } from 'vitest';
import { SnippetProject } from '../support/snippet-project.js';
import { consoleSteps, documents, outputPattern, printedPattern, snippets } from '../support/snippets.js';
import { temporaryFolder } from '../support/temporary-folder.js';

describe('snippets of a document', () => {
  const text = [
    'Text',
    '```js',
    'one();',
    '```',
    '<!-- not run: needs a tap -->',
    '',
    '```sh',
    'two',
    'three',
    '```',
    '<!-- file: four.ts -->',
    '```ts',
    'four();',
    '```',
    '```json',
    '{}',
    '```',
    '````console',
    '$ five',
    '```',
    '````',
  ].join('\n');

  test('are its blocks of known languages, with what the line before says', () => {
    const nothing = { notRun: undefined, file: undefined };
    expect(snippets('x.md', text)).toEqual([
      { document: 'x.md', line: 3, language: 'js', code: 'one();', ...nothing },
      { document: 'x.md', line: 8, language: 'sh', code: 'two\nthree', ...nothing, notRun: 'needs a tap' },
      { document: 'x.md', line: 13, language: 'ts', code: 'four();', ...nothing, file: 'four.ts' },
      { document: 'x.md', line: 19, language: 'console', code: '$ five\n```', ...nothing },
    ]);
  });

  test('are not left out without a reason', () => {
    expect(() => snippets('x.md', '<!-- not run: -->\n```sh\nls\n```')).toThrow(/x\.md:1: .* gives no reason/);
  });
});

describe('console blocks', () => {
  test('are prompts, commands and output', () => {
    const shell = (prompt: string, command: string, output = '') => ({ prompt, command, output });
    expect(consoleSteps('$ tsvisor run\n/ # uname -s\nLinux\n/ # poweroff\nbye\n$')).toEqual({
      steps: [shell('$ ', 'tsvisor run'), shell('/ # ', 'uname -s', 'Linux\n'), shell('/ # ', 'poweroff', 'bye\n')],
      last: '$ ',
    });
    expect(() => consoleSteps('Linux')).toThrow(/begins with a prompt/);
  });

  test('have output that may differ in its numbers and where it is left out', () => {
    expect(outputPattern('Linux 6.1.192\n').test('Linux 6.1.7')).toBe(true);
    expect(outputPattern('Linux 6.1.192\n').test('Linux 6x1.7')).toBe(false);
    expect(outputPattern('first\n…\nlast\n').test('first\nor\nother\nlast')).toBe(true);
    expect(outputPattern('first\n…\nlast\n').test('first\nor\nother')).toBe(false);
    expect(outputPattern('').test('something')).toBe(false);
  });
});

test('programs print what the comments of console.log() say', () => {
  const pattern = printedPattern('if (x) {\n  console.log(a); // one two\n}\nf(); // three\nconsole.log(b); // { … }');
  expect(pattern.test('zero\none\ntwo\n{ anything }')).toBe(true);
  expect(pattern.test('one two')).toBe(false);
  expect(pattern.test('{ anything } one two')).toBe(false);
  expect(printedPattern('f();').test('')).toBe(true);
});

describe('the documents', () => {
  test('have snippets, each of which is run or says why not', () => {
    expect(documents()).toContain('README.md');
    expect(documents().flatMap((document) => snippets(document)).length).toBeGreaterThan(5);
  });

  test('have programs in TypeScript that agree with the types', () => {
    const project = new SnippetProject(temporaryFolder());
    const programs = documents()
      .flatMap((document) => snippets(document))
      .filter(({ language, notRun }) => language === 'ts' && notRun === undefined);
    const files = programs.map((snippet) => project.write(snippet));
    expect(files).not.toEqual([]);
    const options = {
      extends: resolve('tsconfig.json'),
      compilerOptions: {
        noEmit: true,
        allowJs: true,
        rootDir: '/',
        declaration: false,
        sourceMap: false,
        noUnusedLocals: false,
      },
      files,
    };
    writeFileSync(join(project.folder, 'tsconfig.json'), JSON.stringify(options));
    const tsc = spawnSync(resolve('node_modules/.bin/tsc'), ['-p', '.'], { cwd: project.folder, encoding: 'utf8' });
    expect(tsc).toMatchObject({ status: 0, stdout: '' });
  });
});

describe('snippets that fail', () => {
  const project = new SnippetProject(temporaryFolder());
  const [shell, program, printing, console] = snippets(
    'x.md',
    '```sh\ntrue\nls /nowhere\ntrue\n```\n```js\nthrow new Error("broken");\n```\n```js\nconsole.log(1); // 2\n```\n```console\n$ echo one\ntwo\n$\n```',
  );

  test('are found out, with what they printed', async () => {
    if (!shell || !program || !printing || !console) throw new Error('not parsed');
    await expect(project.run(shell)).rejects.toThrow(/it ended with 2:\n\$ true\n\$ ls \/nowhere\n.*\/nowhere/);
    await expect(project.run(program)).rejects.toThrow(/broken/);
    await expect(project.run(printing)).rejects.toThrow(/did not print \/2\/, but:\n1\n/);
    await expect(project.run(console)).rejects.toThrow(/'echo one' printed\none\nand not\ntwo/);
  });

  test('and those that work are not', async () => {
    for (const text of ['```sh\nread -r line # of its own\necho "$line"\n```', '```console\n$ echo 1 a\n2 a\n$\n```']) {
      await Promise.all(snippets('x.md', text).map((snippet) => project.run(snippet)));
    }
  });
});
