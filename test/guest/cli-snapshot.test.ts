import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { cli, cliPath, finish, startCli } from '../support/cli.js';
import { describeKvm } from '../support/kvm.js';
import { Pty } from '../support/pty.js';
import { temporaryFolder } from '../support/temporary-folder.js';
import { Tmux } from '../support/tmux.js';

const folder = temporaryFolder();
const runtime = join(folder, 'runtime');
mkdirSync(runtime, { mode: 0o700 });
process.env.XDG_RUNTIME_DIR = runtime;
const machines = join(runtime, 'tsvisor');
const at = (name: string) => join(folder, name);
/** Of the machine that every test here goes on from. */
const ready = at('ready');

const list = async () => JSON.parse((await cli(['ps', '--json'])).stdout).machines;
const names = () => (existsSync(machines) ? readdirSync(machines) : []);
const exec = (name: string, ...command: string[]) => cli(['exec', name, '--', ...command]);
const restore = async (name: string, ...more: string[]) => {
  const { code, stdout, stderr } = await cli(['restore', ready, '--name', name, '-d', '--json', ...more]);
  expect([code, stderr]).toEqual([0, '']);
  return JSON.parse(stdout);
};
/** What is in the tests' folder that is no snapshot: nothing, but for what they made. */
const leftovers = () => readdirSync(folder).filter((name) => name.startsWith('.'));

const onePlainLine = /^tsvisor: [^\n]+\n$/;

describeKvm('tsvisor snapshot and restore', () => {
  beforeAll(async () => {
    writeFileSync(at('disk'), 'on the disk\n'.padEnd(2 ** 20, '\0'));
    const options = [
      '--rng',
      '--net',
      'user',
      '--drive',
      `${at('disk')},readonly`,
      '--port',
      `name=extra,socket=${at('extra')}`,
    ];
    expect(await cli(['run', '--name', 'base', '-d', ...options])).toMatchObject({ code: 0, stderr: '' });
    // A busy host may be too slow for the first of them. Afterwards the guest is idle, with its shell in memory.
    const prepare = 'echo before >/tmp/state; cat /tmp/state; sleep 3';
    while ((await exec('base', 'sh', '-c', prepare)).code !== 0) expect(names()).toEqual(['base']);
    while (!(await cli(['logs', 'base'])).stdout.includes('/ # ')) await delay(1000);
    const saved = await cli(['snapshot', 'base', ready, '--track']);
    expect(saved).toMatchObject({ code: 0, stderr: '' });
    expect(saved.stdout).toMatch(new RegExp(`^${ready}: [0-9.]+M of memory; the guest stood still for \\d+ ms\\n$`));
  });

  afterAll(async () => {
    for (const { name } of await list()) await cli(['stop', '--force', name]);
  });
  afterEach(async () => {
    for (const { name } of await list()) if (name !== 'base') await cli(['stop', '--force', name]);
  });

  test('the machine goes on; a differential snapshot is small and makes the same machine', async () => {
    expect((await exec('base', 'sh', '-c', 'echo after >>/tmp/state; cat /tmp/state')).stdout).toBe('before\nafter\n');
    const { code, stdout } = await cli(['snapshot', 'base', at('later'), '--differential', '--json']);
    expect(code).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject({ path: at('later'), id: expect.stringMatching(/^[0-9a-f]{32}$/) });
    expect(JSON.parse(stdout).memoryBytes).toBeLessThan(8 * 2 ** 20);
    expect(await cli(['restore', at('later'), '--', 'cat', '/tmp/state'])).toMatchObject({
      code: 0,
      stdout: 'before\nafter\n',
      stderr: '',
    });
    expect(await cli(['restore', ready, '--', 'cat', '/tmp/state'])).toMatchObject({ stdout: 'before\n' });
  });

  test('restore -- COMMAND has its streams, exit code and drives', async () => {
    const command = ['sh', '-c', 'cat; head -n 1 /dev/vda; echo err >&2; exit 6'];
    expect(await cli(['restore', ready, '--stats', at('stats'), '--', ...command], { input: 'input\n' })).toMatchObject(
      {
        code: 6,
        stdout: 'input\non the disk\n',
        stderr: 'err\n',
      },
    );
    expect(JSON.parse(readFileSync(at('stats'), 'utf8')).end).toMatchObject({ reason: 'stopped', code: 6 });
    expect(await cli(['restore', ready, '--', 'nothing-such'])).toMatchObject({ code: 127 });
    expect(names()).toEqual(['base']);
  });

  test('a named one is found by exec, console and ps; snapshot --stop puts it to sleep', async () => {
    const status = await restore('web');
    expect(status).toMatchObject({ name: 'web', snapshot: ready, memory: 2 ** 26, agent: true, console: true });
    expect((await cli(['ps'])).stdout).toMatch(new RegExp(`^web +\\d+ +running +.* +snapshot ${ready}$`, 'm'));
    expect((await exec('web', 'sh', '-c', 'echo asleep >>/tmp/state; cat /tmp/state')).stdout).toBe('before\nasleep\n');
    expect(await cli(['snapshot', 'web', at('asleep'), '--stop', '--disks', 'reference'])).toMatchObject({ code: 0 });
    expect(names()).toEqual(['base']);
    expect(await cli(['restore', at('asleep'), '--', 'cat', '/tmp/state'])).toMatchObject({
      stdout: 'before\nasleep\n',
    });
  });

  test('on a terminal: its prompt, typing, Ctrl-A x, and the terminal as it was', async () => {
    using terminal = new Tmux(90, 25);
    await terminal.type(`${process.execPath} ${cliPath} restore ${ready} --name here`, 'Enter');
    await terminal.shows(/goes on from .*Enter shows its prompt/);
    await terminal.type('Enter');
    await terminal.shows(/^\/ # *$/m);
    await terminal.type('echo one$((1+1))three', 'Enter');
    await terminal.shows(/^one2three\n\/ # *$/m);
    await delay(1000); // the prompt asks the terminal for its cursor, and the answer is typed too
    await terminal.type('C-a', 'x');
    await terminal.shows(/^(\/ # )?# *$/m);
    await terminal.type('echo "code $?"; stty -a | grep -o " icanon"', 'Enter');
    await terminal.shows(/^code 0\n icanon/m);
    expect(names()).toEqual(['base']);
  });

  test('progress is shown on a terminal, and nothing of it stays', async () => {
    using pty = new Pty();
    process.kill((await list())[0].pid, 'SIGSTOP'); // so that it takes time
    const child = spawn(process.execPath, [cliPath, 'snapshot', 'base', at('slow')], {
      stdio: ['ignore', 'pipe', pty.slave],
      env: { ...process.env, TERM: 'vt100' },
    });
    const code = new Promise((resolve) => child.on('close', resolve));
    await pty.shows(/saving base, 1 s/);
    process.kill((await list())[0].pid, 'SIGCONT');
    expect(await code).toBe(0);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: what clears the line
    expect(pty.screen).toMatch(/\r\x1b\[K$/);
  });

  test('clone: as many as asked for, each with its name and what it writes', async () => {
    const { code, stdout, stderr } = await cli(['clone', ready, '--count', '3', '--name', 'worker', '--json']);
    expect([code, stderr]).toEqual([0, '']);
    const expected = ['worker-1', 'worker-2', 'worker-3'];
    expect(JSON.parse(stdout).machines.map(({ name }: { name: string }) => name)).toEqual(expected);
    const said = expected.map((name) => exec(name, 'sh', '-c', 'hostname | tee -a /tmp/state; cat /tmp/state'));
    expect((await Promise.all(said)).map(({ stdout }) => stdout)).toEqual(
      expected.map((name) => `${name}\nbefore\n${name}\n`),
    );
  });

  test('clone starts all, or none', async () => {
    await restore('some-3');
    const result = await cli(['clone', ready, '-n', '4', '--name', 'some']);
    expect(result).toMatchObject({ code: 64, stdout: '', stderr: expect.stringMatching(/'some-3' runs already/) });
    expect(names().sort()).toEqual(['base', 'some-3']);
  });

  test('clone of a machine that runs: its folder goes with the last of them', async () => {
    const shared = () => readdirSync(tmpdir()).filter((name) => name.startsWith('tsvisor-shared-'));
    const before = shared();
    expect(await cli(['clone', 'base', '-n', '2'])).toMatchObject({ code: 0, stdout: 'base-1\nbase-2\n', stderr: '' });
    expect(shared()).toHaveLength(before.length + 1);
    expect((await exec('base-2', 'head', '-n', '1', '/tmp/state')).stdout).toBe('before\n');
    await cli(['stop', '--force', 'base-1']);
    expect(shared()).toHaveLength(before.length + 1);
    await cli(['stop', '--force', 'base-2']);
    expect(shared()).toEqual(before);
  });

  test('migrate: the machine goes on in the process that waits for it', async () => {
    writeFileSync(at('key'), 'a secret of more than 16 bytes', { mode: 0o600 });
    await restore('leaving');
    const address = `unix:${at('move.sock')}`;
    const waiting = await cli(['receive', address, '--key', at('key'), '--name', 'arrived', '-d']);
    expect(waiting).toMatchObject({ code: 0, stdout: `arrived ${address}\n`, stderr: '' });
    const moved = await cli(['migrate', 'leaving', address, '--key', at('key'), '--json']);
    expect(moved).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(moved.stdout)).toMatchObject({ name: 'leaving', downtimeMs: expect.any(Number) });
    expect(names().sort()).toEqual(['arrived', 'base']);
    expect((await exec('arrived', 'cat', '/tmp/state')).stdout).toBe('before\n');
  });

  test('what cannot be moved goes on where it is', async () => {
    writeFileSync(at('key'), 'a secret of more than 16 bytes', { mode: 0o600 });
    writeFileSync(at('other'), 'another secret of 16 bytes or more', { mode: 0o600 });
    writeFileSync(at('open'), 'a secret that others may read', { mode: 0o644 });
    writeFileSync(at('short'), 'short', { mode: 0o600 });
    const address = `unix:${at('wrong.sock')}`;
    for (const [key, message] of [
      ['open', /chmod 600/],
      ['short', /5 bytes, and a key at least 16/],
      ['none', /no such file.*urandom/],
    ] as const) {
      for (const args of [
        ['migrate', 'base', address],
        ['receive', address],
      ]) {
        const result = await cli([...args, '--key', at(key)]);
        expect(result).toMatchObject({ code: 64, stderr: expect.stringMatching(message) });
        expect(result.stderr).toMatch(onePlainLine);
      }
    }
    const alone = await cli(['migrate', 'base', address, '--key', at('key')]);
    expect(alone).toMatchObject({ code: 85, stderr: expect.stringMatching(onePlainLine) });
    expect(await cli(['migrate', 'base', 'there', '--key', at('key')])).toMatchObject({ code: 64 });
    expect(await cli(['receive', address, '--key', at('key'), '--name', 'picky', '-d'])).toMatchObject({ code: 0 });
    const refused = await cli(['migrate', 'base', address, '--key', at('other')]);
    expect(refused).toMatchObject({ code: 85, stderr: expect.stringMatching(onePlainLine) });
    expect(await cli(['receive', `${address}2`, '--key', at('key'), '--name', 'idle', '-d'])).toMatchObject({
      code: 0,
    });
    expect(await cli(['stop', 'idle'])).toMatchObject({ code: 0 });
    await cli(['stop', 'picky']); // forgets it
    expect((await exec('base', 'head', '-n', '1', '/tmp/state')).stdout).toBe('before\n');
    expect(names()).toEqual(['base']);
  });

  test('Ctrl-C at any moment leaves no half folder and no name', async () => {
    for (const after of [0, 60, 120, 150, 180, 210, 240, 300, 400]) {
      const target = at(`interrupted-${after}`);
      const saving = startCli(['snapshot', 'base', target]);
      const saved = finish(saving);
      const restoring = startCli(['restore', ready, '--name', 'brief', '--', 'sleep', '1000']);
      const restored = finish(restoring);
      await delay(after);
      saving.kill('SIGINT');
      const { code, signal, stderr } = await saved;
      // Before Node has a handler the signal does what it always does.
      if (signal === null) expect(code).toBe(existsSync(target) ? 0 : 130);
      expect(stderr).toBe('');
      expect(leftovers(), `after ${after} ms`).toEqual([]);
      for (let i = 0; i < 3; i++) {
        restoring.kill('SIGINT');
        await delay(50);
      }
      const ended = await restored;
      if (ended.signal === null) expect(ended.code).toBe(130);
      expect((await list()).map(({ name }: { name: string }) => name)).toEqual(['base']);
      expect(names()).toEqual(['base']);
    }
  });

  test.each<[string, string[], number, RegExp]>([
    ['no folder', ['restore', at('nothing')], 79, /nothing\/state: there is no such file/],
    ['another folder', ['restore', '/etc'], 79, /a snapshot is a folder/],
    ['a file', ['restore', '/etc/passwd'], 79, /passwd/],
    ['no folder at all', ['restore'], 64, /Not enough/],
    ['detached with a command', ['restore', ready, '-d', '--', 'ls'], 64, /--detach/],
    ['JSON of nothing', ['restore', ready, '--json'], 64, /--json/],
    ['a drive’s key', ['restore', ready, '--drive', 'id=x'], 64, /--drive id=x: .*overlay=FILE/],
    ['a drive that it had not', ['restore', ready, '--drive', 'index=7,file=/etc/passwd'], 64, /drives/],
    ['a drive twice', ['restore', ready, '--drive', 'index=1,file=a', '--drive', 'b'], 64, /twice/],
    ['too many networks', ['restore', ready, '--net', 'user', '--net', 'user'], 64, /networks: 2/],
    ['another kind of network', ['restore', ready, '--net', 'tap=tap9'], 64, /networks\[0\]/],
    ['a console that it had not', ['restore', ready, '--console', 'stdio'], 64, /--console: .*hvc0/],
    ['a port that it had not', ['restore', ready, '--port', `name=no,file=${at('no')}`], 64, /--port no: .*no port/],
    ['a name that is taken', ['restore', ready, '--name', 'base'], 64, /runs already/],
    ['clones of nothing', ['clone', at('nothing')], 68, /no machine.*no such folder/],
    ['clones of no snapshot', ['clone', '/etc'], 79, /a snapshot is a folder/],
    ['no clones', ['clone', ready, '--count', '0'], 64, /--count: 0/],
    ['names that are none', ['clone', ready, '--name', 'a/b'], 64, /no name/],
    ['no machine', ['snapshot', 'nobody', at('x')], 68, /nobody/],
    ['no folder for it', ['snapshot', 'base'], 64, /Not enough/],
    ['a folder that is there', ['snapshot', 'base', ready], 79, /exists already/],
    ['a folder in none', ['snapshot', 'base', at('no/such')], 79, /there is no folder .*\/no$/m],
    ['a place for disks', ['snapshot', 'base', at('x'), '--disks', 'cloud'], 64, /copy/],
  ])('wrong: %s', async (_name, args, code, message) => {
    const result = await cli(args);
    expect(result).toMatchObject({ code, stdout: '', stderr: expect.stringMatching(message) });
    expect(result.stderr).toMatch(onePlainLine);
    expect(names()).toEqual(['base']);
    expect(leftovers()).toEqual([]);
  });

  test('a damaged one is refused, named or not', async () => {
    const damaged = at('damaged');
    mkdirSync(damaged);
    const state = readFileSync(join(ready, 'state'));
    state[200] = (state[200] as number) ^ 1;
    writeFileSync(join(damaged, 'state'), state);
    writeFileSync(join(damaged, 'memory'), '');
    for (const more of [[], ['-d'], ['--', 'true']]) {
      const result = await cli(['restore', damaged, ...more]);
      expect(result).toMatchObject({ code: 79, stdout: '', stderr: expect.stringMatching(/damaged.*checksum/) });
      expect(result.stderr).toMatch(onePlainLine);
    }
    expect(names()).toEqual(['base']);
  });

  test('differential without one before it is refused', async () => {
    await restore('untracked');
    const result = await cli(['snapshot', 'untracked', at('x'), '--differential']);
    expect(result).toMatchObject({ code: 79, stderr: expect.stringMatching(onePlainLine) });
  });
});
