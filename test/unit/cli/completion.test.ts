import { spawn } from 'node:child_process';
import { mkdirSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { MachineFolder } from '#dist/cli/machines/machine-folder.js';
import { cli, cliPath } from '../../support/cli.js';
import { Pty } from '../../support/pty.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const runtime = temporaryFolder();
process.env.XDG_RUNTIME_DIR = runtime;

const complete = async (...words: string[]) => {
  const { stdout, stderr, code } = await cli(['__complete', ...words]);
  expect([stderr, code]).toEqual(['', 0]);
  return stdout.split('\n').filter(Boolean);
};
const wordsOf = async (...words: string[]) => (await complete(...words)).map((line) => line.split('\t')[0]);

describe('completes', () => {
  test('commands, with what they do', async () => {
    expect(await complete('sto')).toEqual(['stop\tEnd a machine']);
    expect(await wordsOf('')).toEqual(expect.arrayContaining(['run', 'exec', 'shell', 'cp', 'ps', 'doctor']));
    expect(await wordsOf('nothing')).toEqual([]);
  });

  test('options and their choices', async () => {
    expect(await complete('run', '--mem')).toEqual(['--memory\tguest RAM; a bare number is MiB']);
    expect(await wordsOf('run', '--acpi', 'o')).toEqual(['on', 'off'].sort().reverse());
    expect(await wordsOf('run', '--kernel', '')).toEqual([]);
    expect(await wordsOf('kernel', '')).toEqual(['build', 'list', 'path']);
    expect(await wordsOf('completion', 'f')).toEqual(['fish']);
  });

  test('names of machines, where there is one to be', async () => {
    const folder = await MachineFolder.claim('webserver');
    for (const command of ['exec', 'shell', 'stop', 'logs', 'console']) {
      expect(await wordsOf(command, 'web'), command).toEqual(['webserver']);
    }
    expect(await wordsOf('exec', '-u', 'root', 'web')).toEqual(['webserver']);
    expect(await wordsOf('exec', '-i', 'web')).toEqual(['webserver']);
    expect(await wordsOf('stop', 'webserver', 'web')).toEqual([]);
    expect(await wordsOf('exec', 'webserver', '--', 'web')).toEqual([]);
    expect(await wordsOf('cp', 'web')).toEqual(['webserver:']);
    expect(await wordsOf('cp', 'file', 'web')).toEqual(['webserver:']);
    folder.release();
  });
});

test('bash, with the Tab key', async () => {
  const folder = await MachineFolder.claim('webserver');
  const programs = join(runtime, 'bin');
  mkdirSync(programs);
  symlinkSync(cliPath, join(programs, 'tsvisor'));
  using pty = new Pty();
  pty.resize(24, 100);
  const env = { ...process.env, PATH: `${programs}:${process.env.PATH}`, PS1: '$ ', TERM: 'vt100' };
  const bash = spawn('bash', ['--norc', '--noprofile', '-i'], { stdio: [pty.slave, pty.slave, pty.slave], env });
  const ended = new Promise((resolve) => bash.on('close', resolve));
  pty.type('source <(tsvisor completion bash); echo rea""dy\n');
  await pty.shows(/ready/, 20);
  pty.type('tsvisor comp\tf\t');
  await pty.shows(/tsvisor completion fish $/, 20);
  pty.type('\x15tsvisor stop --f\tweb\t');
  await pty.shows(/tsvisor stop --force webserver $/, 20);
  pty.type('\x15tsvisor cp package.j\tweb\t');
  await pty.shows(/tsvisor cp package.json webserver:$/, 20);
  pty.type('\x15exit\r');
  await ended;
  folder.release();
});
