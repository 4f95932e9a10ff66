import { spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import { cli, cliPath, finish, startCli } from '../support/cli.js';
import { Console } from '../support/console.js';
import { guestWithPrograms } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { Pty } from '../support/pty.js';

const BOOT = 600_000;
/** The shell asks the terminal where its cursor is. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: terminals speak in control characters
const PROMPT = /# (\x1b\[6n)?$/;
// biome-ignore lint/suspicious/noControlCharactersInRegex: likewise
const AFTER_CTRL_C = /\^C.*# (\x1b\[6n)?$/s;

describeKvm('the default guest', () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  test('runs a script from a pipe, powers off with 0 and writes its statistics', { timeout: BOOT }, async () => {
    const path = join(folder, 'stats.json');
    const input =
      'echo ready-$((40+2))\nuname -a\nls /proc/1 /sys/class /dev/null >/dev/null && echo mounted\npoweroff\n';
    const { code, stdout, stderr } = await cli(['run', '--stats', path], { input });
    expect(stderr).toBe('');
    expect(stdout).toMatch(/^ready-42\r$/m);
    expect(stdout).toMatch(/^Linux .* x86_64/m);
    expect(stdout).toMatch(/^mounted\r$/m);
    expect(code).toBe(0);
    const { phases, milestones, end, exits } = JSON.parse(readFileSync(path, 'utf8'));
    expect(end).toMatchObject({ reason: 'guest-shutdown', code: 0 });
    expect(phases.firstSerialByte).toBeGreaterThan(phases.firstEntry);
    expect(milestones.init).toBeGreaterThan(phases.firstEntry);
    expect(milestones.shell).toBeGreaterThan(milestones.init);
    expect(exits.io).toBeGreaterThan(10);
  });

  test('the end of the input ends the shell, and the guest powers off', { timeout: BOOT }, async () => {
    const { code, stdout } = await cli(['run', '--serial', 'stdio'], { input: 'echo only-$((1+1))\n' });
    expect(stdout).toMatch(/only-2/);
    expect(code).toBe(0);
  });

  test('the console goes to a file; SIGTERM ends the machine', { timeout: BOOT }, async () => {
    const log = join(folder, 'console.log');
    const args = ['run', '--serial', `file:${log}`, '--timeout', '300'];
    const child = startCli(args);
    const result = finish(child);
    const until = Date.now() + 300_000;
    const shown = () => {
      try {
        return readFileSync(log, 'latin1');
      } catch {
        return '';
      }
    };
    while (!shown().includes('#') && Date.now() < until) await delay(100);
    expect(shown()).toMatch(PROMPT);
    child.kill('SIGTERM');
    expect((await result).code).toBe(143);
    expect((await result).stdout).toBe('');
  });

  test('a terminal is raw meanwhile, sized, and sane after', { timeout: BOOT }, async () => {
    using pty = new Pty();
    const before = pty.settings;
    const child = spawn(process.execPath, [cliPath, 'run'], { stdio: [pty.slave, pty.slave, pty.slave] });
    const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
    await pty.shows(PROMPT);
    expect(pty.settings).not.toBe(before);
    pty.type('echo now-$((1+1)); sleep 1000\r');
    await pty.shows(/now-2/); // the line discipline, not the shell's editor, has the keys
    await pty.interrupt(AFTER_CTRL_C); // Ctrl-C is the guest's
    pty.type('\x01h');
    await pty.shows(/Ctrl-A x/);
    pty.type('echo cat-$((1)); cat -v; echo over\r');
    await pty.shows(/cat-1/);
    pty.type('a\x01\x01b\r');
    await pty.shows(/\na\^Ab\r+\n/);
    pty.type('\x01x');
    expect(await ended).toBe(0);
    expect(pty.settings).toBe(before);
  });
});

describeKvm('a running default guest', () => {
  let machine: Machine;
  let shell: Console;
  let folder: string;

  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
    machine = await Machine.create(guestWithPrograms(folder, ['avx-sums']));
    shell = new Console(machine.serial);
    await machine.start();
    await shell.prompt(BOOT / 1e3);
  }, BOOT);
  afterAll(async () => {
    await machine?.close();
    rmSync(folder, { recursive: true });
  });

  test('takes a paste of 64 KiB into cat whole', async () => {
    // Lines of 63 characters: a terminal in canonical mode keeps no line over 4095.
    const lines = Array.from(
      { length: 1024 },
      () => `${randomBytes(40).toString('base64url').padEnd(63, '=').slice(0, 63)}\n`,
    );
    const text = lines.join('');
    expect(text.length).toBe(65536);
    await shell.run('stty -echo');
    // As a person does: the program first, then the paste. What comes earlier is the shell's editor's.
    machine.serial.write(
      'echo started-$((1)); cat >/tmp/paste; md5sum </tmp/paste; wc -c </tmp/paste; echo done-$((1))\n',
    );
    await shell.until(/started-1/);
    await delay(1000);
    machine.serial.write(text);
    machine.serial.write('\x04');
    const out = await shell.until(/done-1/);
    await shell.prompt();
    expect(out).toContain(createHash('md5').update(text).digest('hex'));
    expect(out).toMatch(/\b65536\b/);
    await shell.run('stty echo');
  });

  test('prints 64 KiB that arrive whole', async () => {
    await shell.run(
      'i=0; while [ $i -lt 6 ]; do i=$((i+1)); cat /tmp/paste; done >/tmp/more; head -c 65536 /tmp/more >/tmp/big',
    );
    const out = await shell.run('cat /tmp/big');
    const printed = out
      .replaceAll('\r', '')
      .split('\n')
      .filter((line) => line.length === 63)
      .join('\n');
    expect(createHash('md5').update(`${printed}\n`).digest('hex')).toBe(
      (await shell.run('md5sum </tmp/big')).match(/[0-9a-f]{32}/)?.[0],
    );
  });

  test('reads the clock of the host', async () => {
    const seconds = Number((await shell.run('date +%s')).match(/\d{9,}/)?.[0]);
    expect(Math.abs(seconds - Date.now() / 1e3)).toBeLessThan(30);
  });

  test('two processes that compute with AVX at once get the right sums', async () => {
    const out = await shell.run('avx-sums & avx-sums; wait; echo finished');
    expect(out.match(/^avx sums right/gm)).toHaveLength(2);
    expect(out).not.toMatch(/wrong/);
  });
});
