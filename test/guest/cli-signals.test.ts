import { spawn } from 'node:child_process';
import { setTimeout as delay } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { cliPath, finish, startCli } from '../support/cli.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { Pty } from '../support/pty.js';

/** Prints without end, and never looks at its input. */
const chatter = () =>
  guestProgram('again: mov dx, SERIAL\nmov al, 0x78\nout dx, al\nmov dx, SERIAL + 5\nin al, dx\njmp again');
const silent = () => guestProgram('again: pause; jmp again');

/** Deterministic moments between process start and well into the guest. */
const moments = [0, 10, 35, 60, 90, 120, 160, 210, 260, 320, 400, 700];

const until = async (condition: () => boolean) => {
  for (const end = Date.now() + 60_000; !condition() && Date.now() < end; ) await delay(5);
};

describeKvm('signals at any moment', () => {
  for (const [signal, code] of [
    ['SIGTERM', 143],
    ['SIGINT', 130],
    ['SIGHUP', 129],
  ] as const) {
    test(`${signal} ends the process in time`, async () => {
      for (const after of moments) {
        const child = startCli(['run', '--kernel', chatter()]);
        const result = finish(child);
        await delay(after);
        child.kill(signal);
        const ended = await Promise.race([result, delay(60_000)]);
        expect(ended, `${signal} after ${after} ms`).toBeDefined();
        // Before Node has a handler the signal does what it always does.
        if (ended && ended.signal === null) expect(ended.code).toBe(code);
        else expect(ended?.signal).toBe(signal);
      }
    });
  }

  test('SIGTERM ends it when nobody reads its output', async () => {
    const child = startCli(['run', '--kernel', chatter()]);
    await new Promise((resolve) => child.stdout.once('readable', resolve)); // and then no read
    await delay(500);
    child.kill('SIGTERM');
    const code = await Promise.race([new Promise((resolve) => child.on('exit', resolve)), delay(60_000)]);
    expect(code).toBe(143);
  });

  test('a closed stdout ends it', async () => {
    const script = `"${process.execPath}" "${cliPath}" run --kernel "${chatter()}" | head -c 10; exit \${PIPESTATUS[0]}`;
    const child = spawn('bash', ['-c', script], { stdio: 'pipe' });
    child.stdin.end();
    const result = await Promise.race([finish(child), delay(60_000)]);
    expect(result).toMatchObject({ code: 141, stdout: 'xxxxxxxxxx', stderr: '' });
  });

  test('closed stdin, stdout and stderr are no obstacle', async () => {
    const kernel = guestProgram('mov al, 9; out DEBUG_EXIT, al');
    const script = `"${process.execPath}" "${cliPath}" run --kernel "${kernel}" <&- >&- 2>&-`;
    const child = spawn('bash', ['-c', script], { stdio: 'pipe' });
    expect(await Promise.race([finish(child), delay(60_000)])).toMatchObject({ code: 9 });
  });

  test('--timeout ends it with 124', async () => {
    const result = await finish(startCli(['run', '--kernel', silent(), '--timeout', '0.3']));
    expect(result.code).toBe(124);
  });
});

describeKvm('the terminal is restored', () => {
  for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) {
    test(`after ${signal} at any moment`, async () => {
      for (const after of moments) {
        using pty = new Pty();
        const before = pty.settings;
        const child = spawn(process.execPath, [cliPath, 'run', '--kernel', silent()], {
          stdio: [pty.slave, pty.slave, pty.slave],
        });
        const ended = new Promise<void>((resolve) => child.on('close', () => resolve()));
        await delay(after);
        child.kill(signal);
        expect(await Promise.race([ended.then(() => true), delay(60_000)])).toBe(true);
        expect(pty.settings, `${signal} after ${after} ms`).toBe(before);
      }
    });
  }

  test('after the guest ends, crashes or is escaped from', async () => {
    for (const assembly of ['mov al, 3; out DEBUG_EXIT, al', 'ud2', 'again: jmp again']) {
      using pty = new Pty();
      const before = pty.settings;
      const child = spawn(process.execPath, [cliPath, 'run', '--kernel', guestProgram(assembly)], {
        stdio: [pty.slave, pty.slave, pty.slave],
      });
      const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
      if (assembly.includes('jmp')) {
        await until(() => pty.settings !== before);
        pty.type('\x01x');
      }
      expect(await ended).toBe(assembly.includes('ud2') ? 81 : assembly.includes('jmp') ? 0 : 3);
      expect(pty.settings).toBe(before);
    }
  });

  test('kill -9 leaves no other process behind', async () => {
    for (const after of moments) {
      const child = startCli(['run', '--kernel', chatter()]);
      const result = finish(child);
      await delay(after);
      child.kill('SIGKILL');
      expect((await result).signal).toBe('SIGKILL');
      const group = await finish(spawn('pgrep', ['-P', String(child.pid)], { stdio: 'pipe' }));
      expect(group.stdout).toBe('');
    }
  });
});
