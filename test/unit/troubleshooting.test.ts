import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { END_EXIT, ERROR_EXIT, SIGNAL_EXIT } from '#dist/cli/exit-codes.js';

/** Every error code and end reason with what its exit code is written as; the types of the tables make them complete. */
const expected: [string, RegExp][] = [
  ...Object.entries({ ...ERROR_EXIT, ...END_EXIT }).map(([name, code]): [string, RegExp] => [
    name,
    new RegExp(`^${code}$`),
  ]),
  ['guest-exit', /^0-255$/],
  ['stopped', new RegExp(`${Object.values(SIGNAL_EXIT).join(', ')}$`)],
];

describe('docs/troubleshooting.md', () => {
  const text = readFileSync('docs/troubleshooting.md', 'utf8');
  const sections = [...text.matchAll(/^### (.*) \(exit code (.*)\)\n\n(\S.*)/gm)];
  const documented = sections.flatMap(([, names = '', code = '']) =>
    [...names.matchAll(/`([^`]+)`/g)].map(([, name = '']): [string, string] => [name, code]),
  );

  test.each(expected)('explains %s with its exit code', (name, code) => {
    expect(documented.filter(([documented]) => documented === name).map(([, code]) => code)).toEqual([
      expect.stringMatching(code),
    ]);
  });

  test('explains nothing that does not exist', () => {
    expect(documented.map(([name]) => name).sort()).toEqual(expected.map(([name]) => name).sort());
    expect(text.match(/^###/gm)).toHaveLength(sections.length);
  });
});

describe("README.md's table of exit codes", () => {
  const rows = readFileSync('README.md', 'utf8').matchAll(/^\| ([-\d, ]+) \| (.*?) \|/gm);
  const documented = [...rows].map(([, code = '', names = '']) => [code, names] as const);

  test.each(expected)('has %s with its exit code', (name, code) => {
    expect(documented.filter(([, names]) => names.includes(`\`${name}\``)).map(([code]) => code)).toEqual([
      expect.stringMatching(code),
    ]);
  });
});
