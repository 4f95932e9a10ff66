import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { cli, cliPath, finish, startCli } from '../support/cli.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { Pty } from '../support/pty.js';
import { temporaryFolder } from '../support/temporary-folder.js';
import { Tmux } from '../support/tmux.js';

const folder = temporaryFolder();
const runtime = join(folder, 'runtime');
mkdirSync(runtime, { mode: 0o700 });
process.env.XDG_RUNTIME_DIR = runtime;
const machines = join(runtime, 'tsvisor');

const silent = () => guestProgram('again: pause; jmp again');
const exits = (code: number) => guestProgram(`mov al, ${code}; out DEBUG_EXIT, al`);
const says = (text: string) =>
  guestProgram(
    `${[...text].map((c) => `mov dx, SERIAL\nmov al, ${c.charCodeAt(0)}\nout dx, al`).join('\n')}\nagain: pause; jmp again`,
  );

const list = async () => JSON.parse((await cli(['ps', '--json'])).stdout).machines;
const names = () => (existsSync(machines) ? readdirSync(machines) : []);
const until = async (condition: () => boolean | Promise<boolean>, seconds = 120) => {
  for (const end = Date.now() + seconds * 1e3; !(await condition()); await delay(50)) {
    if (Date.now() > end) throw new Error(`never: ${condition}`);
  }
};
const detach = async (name: string, kernel: string, ...more: string[]) => {
  const { code, stdout, stderr } = await cli(['run', '--name', name, '-d', '--json', '--kernel', kernel, ...more]);
  expect([code, stderr]).toEqual([0, '']);
  return JSON.parse(stdout) as { pid: number; name: string };
};
const isAlive = (pid: number) =>
  existsSync(`/proc/${pid}`) && !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'latin1'));

afterAll(async () => {
  for (const { name, pid } of await list()) {
    await cli(['stop', '--force', name]);
    if (pid !== undefined && isAlive(pid)) process.kill(pid, 'SIGKILL');
  }
});

/** A command of the program on a terminal. */
function onTerminal(pty: Pty, args: readonly string[]): { child: ChildProcess; code: Promise<number | null> } {
  const child = spawn(process.execPath, [cliPath, ...args], {
    stdio: [pty.slave, pty.slave, pty.slave],
    env: { ...process.env, TERM: 'vt100' },
  });
  return { child, code: new Promise((resolve) => child.on('close', resolve)) };
}

describeKvm('a detached machine', () => {
  test('is listed, has a name of its own and is stopped', async () => {
    const { code, stdout } = await cli(['run', '--detach', '--kernel', silent()]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^vm-[0-9a-f]{6}\n$/);
    const name = stdout.trim();
    expect(await list()).toMatchObject([{ name, state: 'running', detached: true, agent: false, memory: 2 ** 26 }]);
    expect((await cli(['ps'])).stdout).toMatch(new RegExp(`^NAME .*\\n${name} +\\d+ +running +\\d+s +64M +1 +/.*\\n$`));
    expect((await cli(['ps', '-q'])).stdout).toBe(`${name}\n`);
    const [{ pid }] = await list();
    expect(readFileSync(`/proc/${pid}/stat`, 'latin1').split(' ').slice(4, 7)).toContain('0'); // no terminal
    const stop = await cli(['stop', name, '--json']);
    expect(JSON.parse(stop.stdout)).toMatchObject({ name, reason: 'stopped', exitCode: 0 });
    await until(() => !isAlive(pid)); // it may take a moment more
    expect(names()).toEqual([]);
    expect(await list()).toEqual([]);
  });

  test('that does not start is an error of the command, and leaves nothing', async () => {
    for (const [args, code, message] of [
      [['--kernel', '/nonexistent'], 66, /^tsvisor: kernel \/nonexistent: [^\n]*\n$/],
      [['--kernel', silent(), '--memory', '900000G'], 71, /^tsvisor: memory[^\n]*\n$/],
      [['--kernel', silent(), '--drive', '/nonexistent'], 72, /^tsvisor: [^\n]*nonexistent[^\n]*\n$/],
      [['--kernel', silent(), '--name', 'a/b'], 64, /^tsvisor: 'a\/b' is no name[^\n]*\n$/],
    ] as const) {
      const result = await cli(['run', '-d', ...args]);
      expect(result).toMatchObject({ code, stdout: '', stderr: expect.stringMatching(message) });
    }
    expect(names()).toEqual([]);
  });

  test('that fails later is kept for ps and logs until it is stopped', async () => {
    await detach('brief', exits(7));
    await until(async () => (await list())[0]?.state === 'failed');
    expect(await list()).toMatchObject([{ name: 'brief', state: 'failed', exitCode: 7 }]);
    expect((await cli(['ps'])).stdout).toMatch(/brief +- +failed \(7\)/);
    expect((await cli(['logs', 'brief'])).code).toBe(0);
    expect((await cli(['exec', 'brief', '--', 'ls'])).code).toBe(68);
    expect((await cli(['stop', 'brief'])).code).toBe(0);
    expect(names()).toEqual([]);
  });

  test('of a name that is taken is refused; of two at once one starts', async () => {
    const kernel = silent();
    const two = await Promise.all([1, 2].map(() => cli(['run', '--name', 'same', '-d', '--kernel', kernel])));
    expect(two.map(({ code }) => code).sort()).toEqual([0, 64]);
    const refused = await cli(['run', '--name', 'same', '--kernel', kernel]);
    expect(refused).toMatchObject({
      code: 64,
      stderr: expect.stringMatching(/'same' runs already.*tsvisor stop same\n$/),
    });
    expect((await cli(['stop', 'same'])).code).toBe(0);
  });

  test('whose process is killed leaves nothing that lasts', async () => {
    const { pid } = await detach('victim', says('hello'));
    const logs = startCli(['logs', '-f', 'victim']);
    const follower = finish(logs);
    await once(logs.stdout, 'data');
    process.kill(pid, 'SIGKILL');
    expect(await follower).toMatchObject({ code: 0 });
    await until(() => !isAlive(pid));
    expect(names()).toEqual(['victim']);
    expect((await cli(['stop', 'victim'])).code).toBe(68);
    expect(await list()).toEqual([]);
    expect(names()).toEqual([]);
    const second = await detach('victim', silent());
    process.kill(second.pid, 'SIGKILL');
    await until(() => !isAlive(second.pid));
    await detach('victim', silent()); // in its place
    expect((await cli(['stop', 'victim'])).code).toBe(0);
  });

  test('ends on SIGTERM', async () => {
    const { pid } = await detach('term', silent());
    process.kill(pid, 'SIGTERM');
    await until(() => !isAlive(pid));
    expect(names()).toEqual([]);
  });

  test('that does not answer is told of, and killed by --force', async () => {
    const { pid } = await detach('stuck', silent());
    process.kill(pid, 'SIGSTOP');
    expect(await list()).toMatchObject([{ name: 'stuck', state: 'unresponsive', pid }]);
    const stop = await cli(['stop', 'stuck', '--timeout', '0.1']);
    expect(stop).toMatchObject({
      code: 124,
      stderr: expect.stringMatching(/^tsvisor: machine stuck does not answer[^\n]*\n$/),
    });
    expect((await cli(['stop', 'stuck', '--force'])).code).toBe(0);
    await until(() => !isAlive(pid)); // it may take a moment more
    expect(names()).toEqual([]);
  });

  test('whose guest does not power off has its power cut when the least patient says so', async () => {
    await detach('deaf', silent(), '--agent');
    const patient = connect(join(machines, 'deaf', 'control.sock'));
    patient.write('{"version":1,"method":"stop","params":{"timeout":1000000,"force":false}}\n');
    await once(patient, 'connect');
    const stop = await cli(['stop', 'deaf', '--timeout', '0.5', '--json']);
    expect(JSON.parse(stop.stdout)).toMatchObject({ reason: 'stopped', exitCode: 0 });
    patient.destroy();
  });

  test('goes on without its folder, and ends without harm to the next of its name', async () => {
    const first = await detach('lost', silent());
    rmSync(join(machines, 'lost'), { recursive: true });
    expect(await list()).toEqual([]);
    const second = await detach('lost', silent());
    process.kill(first.pid, 'SIGTERM');
    await until(() => !isAlive(first.pid));
    expect(await list()).toMatchObject([{ name: 'lost', pid: second.pid }]);
    expect((await cli(['stop', 'lost'])).code).toBe(0);
  });

  test('outlives clients that keep to nothing', async () => {
    await detach('tough', says('hello'));
    const control = join(machines, 'tough', 'control.sock');
    for (let i = 0; i < 100; i++) {
      const socket = connect(control);
      socket.on('error', () => {});
      socket.write(['\0'.repeat(i * 1000), '{"version":1,"method":"console"}\n', '{'][i % 3] ?? '');
      if (i % 2) setTimeout(() => socket.destroy(), i % 7);
      else socket.end();
    }
    await delay(300);
    expect(await list()).toMatchObject([{ name: 'tough', state: 'running' }]);
    expect((await cli(['logs', 'tough'])).stdout).toBe('hello');
    expect((await cli(['exec', 'tough', '--', 'ls'])).stderr).toMatch(/^tsvisor: machine tough .*--agent\n$/);
    expect((await cli(['stop', 'tough'])).code).toBe(0);
  });
});

describeKvm('a machine in the foreground', () => {
  test('has a name too, and its console is shared', async () => {
    const child = startCli(['run', '--name', 'here', '--kernel', says('output')]);
    const result = finish(child);
    await until(async () => (await list())[0]?.state === 'running');
    expect(await list()).toMatchObject([{ name: 'here', detached: false }]);
    await until(async () => (await cli(['logs', 'here'])).stdout === 'output');
    expect((await cli(['logs', '--process', 'here'])).stderr).toMatch(/not detached\n$/);
    expect((await cli(['stop', 'here'])).code).toBe(0);
    expect(await result).toMatchObject({ code: 0, stdout: 'output', stderr: '' });
    expect(names()).toEqual([]);
  });

  test('with --timeout and a command that cannot be reached', async () => {
    const result = await cli(['run', '--timeout', '2', '--kernel', silent(), '--', 'ls']);
    expect(result).toMatchObject({ code: 124, stdout: '' });
  });

  test.each([
    [['run', '-d', '--', 'ls'], /--detach: does not go with a command/],
    [['run', '--json'], /--json: goes with --detach/],
    [['exec', 'x'], /a command is needed/],
    [['cp', 'a', 'b'], /NAME:PATH/],
    [['cp', 'x:a', 'y:b'], /NAME:PATH/],
    [['logs', 'x', '-n', 'many'], /--lines: many/],
    [['stop', 'x', '--timeout', '0'], /--timeout: 0/],
  ])('%j is wrong', async (args, message) => {
    expect(await cli(args)).toMatchObject({ code: 64, stdout: '', stderr: expect.stringMatching(message) });
  });

  test.each(['exec', 'shell', 'stop', 'logs', 'console'])('%s of a machine that is not there', async (command) => {
    const more = command === 'exec' ? ['--', 'ls'] : [];
    const result = await cli([command, 'nobody', ...more]);
    expect(result).toMatchObject({
      code: 68,
      stderr: "tsvisor: no machine 'nobody' runs; tsvisor ps lists those that do\n",
    });
  });
});

describeKvm('in a machine with the agent', () => {
  let pid = 0;
  beforeAll(async () => {
    const { code, stdout, stderr } = await cli(['run', '--name', 'web', '-d', '--json']);
    expect([code, stderr]).toEqual([0, '']);
    pid = JSON.parse(stdout).pid;
    // It waits for the boot, for which a busy host may need longer.
    await until(async () => (await cli(['exec', 'web', '--', 'true'])).code === 0, 500);
  });

  const exec = (args: readonly string[], input = '') => cli(['exec', ...args], { input });

  test('exec has the command’s streams and exit code', async () => {
    const both = await exec(['web', '--', 'sh', '-c', 'echo out; echo err >&2; exit 7']);
    expect(both).toMatchObject({ code: 7, stdout: 'out\n', stderr: 'err\n' });
    expect(await exec(['web', '--', 'sh', '-c', 'kill -9 $$'])).toMatchObject({ code: 137 });
    expect(await exec(['-i', 'web', '--', 'wc', '-c'], 'x'.repeat(100_000))).toMatchObject({ stdout: '100000\n' });
    expect(await exec(['web', '--', 'cat'], 'not read')).toMatchObject({ code: 0, stdout: '' });
    expect(await exec(['web', 'echo', 'a', '--', '--b'])).toMatchObject({ stdout: 'a --b\n' });
  });

  test('exec has environment, folder, user and a time', async () => {
    const args = [
      '-e',
      'A=1 2',
      '-e',
      'B',
      '-w',
      '/tmp',
      '-u',
      '65534:65534',
      'web',
      '--',
      'sh',
      '-c',
      'echo $A-$B; pwd; id -u',
    ];
    process.env.B = 'from here';
    expect(await exec(args)).toMatchObject({ stdout: '1 2-from here\n/tmp\n65534\n' });
    delete process.env.B;
    const late = await exec(['--timeout', '0.5', 'web', '--', 'sleep', '100']);
    expect(late).toMatchObject({ code: 124, stderr: expect.stringMatching(/^tsvisor: [^\n]*\n$/) });
  });

  test('exec tells programs that cannot be run', async () => {
    expect(await exec(['web', '--', 'nothing-such'])).toMatchObject({
      code: 127,
      stderr: expect.stringMatching(/nothing-such/),
    });
    expect(await exec(['web', '--', '/etc'])).toMatchObject({ code: 126, stderr: expect.stringMatching(/\/etc/) });
  });

  test('exec sends signals on, and gives up when they are not heeded', async () => {
    const heeds = startCli([
      'exec',
      'web',
      '--',
      'sh',
      '-c',
      'trap "echo caught; exit 3" TERM; echo set; while :; do sleep 0.1; done',
    ]);
    await once(heeds.stdout, 'data');
    const heeded = finish(heeds);
    heeds.kill('SIGTERM');
    expect(await heeded).toMatchObject({ code: 3, stdout: 'caught\n' });

    const deaf = startCli(['exec', 'web', '--', 'sh', '-c', 'trap "" INT; echo $$; while :; do sleep 0.1; done']);
    const [number] = await once(deaf.stdout, 'data');
    const ended = finish(deaf);
    for (let i = 0; i < 3; i++) {
      deaf.kill('SIGINT');
      await delay(100);
    }
    expect(await ended).toMatchObject({ code: 130 });
    // The agent ends what nobody is there for.
    await until(async () => (await exec(['web', '--', 'test', '-d', `/proc/${String(number).trim()}`])).code === 1);
  });

  test('exec ends when its stdout is closed', async () => {
    const script = `"${process.execPath}" "${cliPath}" exec web -- yes | head -n 1; exit \${PIPESTATUS[0]}`;
    const child = spawn('bash', ['-c', script], { stdio: 'pipe' });
    child.stdin.end();
    expect(await finish(child)).toMatchObject({ code: 141, stdout: 'y\n', stderr: '' });
  });

  test('exec on a terminal: raw, with its size and type, and as it was afterwards', async () => {
    using pty = new Pty();
    pty.resize(33, 99);
    const before = pty.settings;
    const { child, code } = onTerminal(pty, [
      'exec',
      'web',
      '--',
      'sh',
      '-c',
      'stty size; echo $TERM; read line; until stty size | grep 44; do :; done; exit 5',
    ]);
    await pty.shows(/33 99\r\nvt100\r\n/);
    expect(pty.settings).not.toBe(before);
    pty.resize(44, 77);
    child.kill('SIGWINCH');
    pty.type('\r');
    expect(await code).toBe(5);
    expect(pty.screen).toMatch(/44 77\r\n$/);
    expect(pty.settings).toBe(before);
  });

  test('shell: Ctrl-C is the guest’s; its exit code', async () => {
    using pty = new Pty();
    pty.resize(24, 80);
    const before = pty.settings;
    const { code } = onTerminal(pty, ['shell', 'web']);
    await pty.shows(/# /);
    pty.type('echo so$((1)); sleep 1000\r');
    await pty.shows(/so1/); // the line discipline, not the shell's editor, has the keys
    await pty.interrupt(/\^C[\s\S]*# /);
    pty.type('exit 9\r');
    expect(await code).toBe(9);
    expect(pty.settings).toBe(before);
    expect(await cli(['shell', 'web'], { input: 'echo "as $0"; tty; exit 4\n' })).toMatchObject({
      code: 4,
      stdout: expect.stringMatching(/not a tty\n$/),
    });
  });

  test('an editor in a shell in tmux: keys, screen, size, and the terminal afterwards', async () => {
    using terminal = new Tmux(90, 25);
    await terminal.type(`${process.execPath} ${cliPath} shell web`, 'Enter');
    await terminal.shows(/^~ # *$/m);
    await terminal.type('vi /tmp/note', 'Enter');
    await terminal.shows(/^- \/tmp\/note/m);
    await terminal.type('i', 'written in tmux', 'Escape');
    await terminal.shows(/^- \/tmp\/note \[Modified\]/m); // an escape by itself
    await terminal.type(':wq', 'Enter');
    await terminal.shows(/^~ # *$/m);
    terminal.resize(100, 30);
    await terminal.type('clear; stty size; cat /tmp/note', 'Enter');
    await terminal.shows(/^30 100\nwritten in tmux\n~ # *$/m);
    await terminal.type('echo so$((1)); sleep 1000', 'Enter');
    await terminal.shows(/^so1$/m);
    for (let i = 0; i < 100 && !/\^C\n~ # *$/m.test(terminal.screen); i++) {
      await terminal.type('C-c'); // what is only being started may miss the first
      await delay(1000);
    }
    await terminal.shows(/\^C\n~ # *$/m);
    await terminal.type('exit 6', 'Enter');
    await terminal.shows(/^# *$/m);
    await terminal.type('echo "code $?"; stty -a | grep -o " icanon"', 'Enter');
    await terminal.shows(/^code 6\n icanon/m);
  });

  test('a terminal is restored whatever ends it', async () => {
    for (const signal of ['SIGHUP', 'SIGTERM'] as const) {
      using pty = new Pty();
      const before = pty.settings;
      const { child, code } = onTerminal(pty, ['exec', 'web', '--', 'sh', '-c', 'echo up; exec sleep 1000']);
      await pty.shows(/up/);
      child.kill(signal);
      expect(await code).toBe(signal === 'SIGHUP' ? 129 : 143);
      expect(pty.settings).toBe(before);
    }
  });

  test('cp brings trees in and out', async () => {
    const tree = join(folder, 'tree');
    mkdirSync(join(tree, 'sub'), { recursive: true });
    writeFileSync(join(tree, 'sub', 'file'), 'content');
    writeFileSync(join(tree, 'program'), '#!/bin/sh\n', { mode: 0o755 });
    symlinkSync('sub/file', join(tree, 'link'));
    expect(await cli(['cp', tree, 'web:/tmp'])).toMatchObject({ code: 0, stdout: '', stderr: '' });
    expect((await exec(['web', '--', 'sh', '-c', 'cat /tmp/tree/link; test -x /tmp/tree/program'])).stdout).toBe(
      'content',
    );
    expect((await cli(['cp', `${tree}/.`, 'web:/tmp/other'])).code).toBe(0);
    expect((await exec(['web', '--', 'ls', '/tmp/other'])).stdout).toBe('link\nprogram\nsub\n');
    const out = join(folder, 'out');
    expect((await cli(['cp', 'web:/tmp/tree', out])).code).toBe(0);
    expect((await cli(['cp', 'web:/tmp/tree', out])).code).toBe(0); // into it, the second time
    expect(readFileSync(join(out, 'link'), 'utf8')).toBe('content');
    expect(readdirSync(join(out, 'tree')).sort()).toEqual(['link', 'program', 'sub']);
    expect(await cli(['cp', 'web:/nothing', out])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/\/nothing/),
    });
    expect(await cli(['cp', join(folder, 'nothing'), 'web:/tmp'])).toMatchObject({ code: 64 });
  });

  test('console: joined by two, left by Ctrl-A d, and the machine goes on', async () => {
    using pty = new Pty();
    const before = pty.settings;
    const { code } = onTerminal(pty, ['console', 'web']);
    await pty.shows(/Ctrl-A d leaves it running[\s\S]*# /);
    const other = startCli(['console', 'web']);
    const heard = finish(other);
    await once(other.stdout, 'data');
    pty.type('echo one$((1+1))three\r');
    await pty.shows(/one2three/);
    pty.type('\x01h');
    await pty.shows(/Ctrl-A x {2}end the machine/);
    pty.type('\x01d');
    expect(await code).toBe(0);
    expect(pty.settings).toBe(before);
    other.kill('SIGTERM');
    expect(await heard).toMatchObject({ code: 143, stdout: expect.stringMatching(/one2three/) });
    expect((await cli(['logs', 'web'])).stdout).toMatch(/one2three/);
    expect((await cli(['logs', '-n', '2', 'web'])).stdout).toMatch(/^[^\n]*one2three\r?\n[^\n]*$/);
    expect(isAlive(pid)).toBe(true);
  });

  test('progress is shown on a terminal, and nothing of it stays', async () => {
    using pty = new Pty();
    const child = spawn(process.execPath, [cliPath, 'run', '--', 'true'], {
      stdio: ['ignore', 'pipe', pty.slave],
      env: { ...process.env, TERM: 'vt100' },
    });
    const ended = new Promise((resolve) => child.on('close', resolve));
    await pty.shows(/booting, 1 s/);
    child.kill('SIGTERM');
    expect(await ended).toBe(143);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: what clears the line
    expect(pty.screen).toMatch(/\r\x1b\[K$/);
  });

  test('stop powers it off by its agent; who follows its log is done', async () => {
    const logs = startCli(['logs', '-f', '-n', '2', 'web']);
    const follower = finish(logs);
    await once(logs.stdout, 'data');
    const { code, stdout, stderr } = await cli(['stop', 'web', '--json', '--timeout', '240']);
    expect([code, stderr]).toEqual([0, '']);
    expect(JSON.parse(stdout)).toMatchObject({ reason: 'guest-shutdown', exitCode: 0 });
    expect(await follower).toMatchObject({ code: 0 });
    await until(() => !isAlive(pid)); // it may take a moment more
    expect(names()).toEqual([]);
  });

  test('run -- COMMAND has its exit code and streams, and nothing of the boot', async () => {
    const args = ['run', '--name', 'once', '--', 'sh', '-c', 'cat; echo err >&2; exit 6'];
    expect(await cli(args, { input: 'input' })).toMatchObject({ code: 6, stdout: 'input', stderr: 'err\n' });
    expect(names()).toEqual([]);
  });
});
