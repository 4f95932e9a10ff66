import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { cli, finish, startCli } from '../support/cli.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'tsvisor-streams-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** Prints by the emergency register of the console device, which is the first one: a driver is not needed. */
const print = (text: string) =>
  `mov rdi, 0xd0000108\n${[...text].map((c) => `mov byte ptr [rdi], ${c.charCodeAt(0)}`).join('\n')}\n`;
const serial = (text: string) =>
  `mov dx, SERIAL\n${[...text].map((c) => `mov al, ${c.charCodeAt(0)}\nout dx, al`).join('\n')}\n`;
const says = (text: string) => guestProgram(`${print(text)}mov al, 5\nout DEBUG_EXIT, al`);
/** Says it again and again. */
const repeats = (text: string) =>
  guestProgram(`again: ${print(text)}mov ecx, 20000\nwait: pause\nloop wait\njmp again`);
/** By the clock's seconds, since a loop takes a thousand times longer where KVM interprets it. */
const twoSeconds = `mov ecx, 3
change: mov al, 0
out 0x70, al
in al, 0x71
cmp al, bl
je change
mov bl, al
loop change
`;
const silent = () => guestProgram('again: pause; jmp again');

const appears = async (path: string) => {
  for (const end = Date.now() + 60_000; !existsSync(path); await delay(5)) {
    if (Date.now() > end) throw new Error(`${path} never appeared`);
  }
};

/** A client of a port's socket. */
class Client {
  text = '';
  readonly socket: Socket;
  readonly closed: Promise<void>;

  constructor(path: string) {
    this.socket = connect(path);
    this.socket.on('data', (chunk) => {
      this.text += chunk;
    });
    this.socket.on('error', () => {});
    this.closed = new Promise((resolve) => this.socket.on('close', () => resolve()));
  }

  async until(pattern: RegExp): Promise<void> {
    for (const end = Date.now() + 60_000; !pattern.test(this.text); await delay(5)) {
      if (Date.now() > end) throw new Error(`the port never said ${pattern}, but ${this.text}`);
    }
  }
}

describe('usage errors are one line', () => {
  for (const [what, args, message] of [
    [
      'a console that is none',
      ['--console', 'tcp:1'],
      /--console: 'tcp:1' is not stdio, none, file:PATH or socket:PATH/,
    ],
    ['a serial that is none', ['--serial', 'socket:x'], /--serial: 'socket:x' is not stdio, none or file:PATH/],
    ['a file without a path', ['--console', 'file:'], /--console: 'file:'/],
    ['two on stdio', ['--console', 'stdio', '--serial', 'stdio'], /--serial: --console has stdio already/],
    ['a port without a path', ['--port', 'name=x'], /--port: 'name=x' is not name=NAME,socket=PATH or name=NAME,file/],
    ['a port without a name', ['--port', 'socket=x'], /--port: 'socket=x'/],
    ['a port of stdio', ['--port', 'name=x,stdio'], /--port: 'name=x,stdio'/],
    ['a bad port name', ['--port', 'name=a b,file=x'], /'a b' is not letters, digits and/],
    ['two ports of a name', ['--port', 'name=x,file=a', '--port', 'name=x,file=b'], /there is a 'x' already/],
    [
      'a port of the console’s name',
      ['--console', 'none', '--console', 'file:a', '--port', 'name=hvc0,file=b'],
      /'hvc0'/,
    ],
  ] as const) {
    test(what, async () => {
      const { code, stdout, stderr } = await cli(['run', '--kernel', silent(), ...args]);
      expect(stderr).toMatch(message);
      expect(stderr).toMatch(/^tsvisor: [^\n]*\n$/);
      expect(stdout).toBe('');
      expect(code).toBe(64);
    });
  }
});

describeKvm('--console', () => {
  test('stdio alone: the terminal is hvc0, and there is no ttyS0', async () => {
    const kernel = guestProgram(`${serial('lost')}${print('console\n')}mov al, 5\nout DEBUG_EXIT, al`);
    const { code, stdout, stderr } = await cli(['run', '--kernel', kernel, '--console', 'stdio']);
    expect([stdout, stderr, code]).toEqual(['console\n', '', 5]);
  });

  test('a file, beside the serial console', async () => {
    const path = join(folder, 'console');
    const kernel = guestProgram(`${serial('serial')}${print('console')}mov al, 5\nout DEBUG_EXIT, al`);
    const { code, stdout } = await cli(['run', '--kernel', kernel, '--console', `file:${path}`]);
    expect([stdout, code]).toEqual(['serial', 5]);
    expect(readFileSync(path, 'latin1')).toBe('console');
  });

  test('stdio beside a serial console in a file', async () => {
    const path = join(folder, 'serial');
    const kernel = guestProgram(`${serial('serial')}${print('console')}mov al, 5\nout DEBUG_EXIT, al`);
    const args = ['run', '--kernel', kernel, '--console', 'stdio', '--serial', `file:${path}`];
    const { code, stdout } = await cli(args);
    expect([stdout, code]).toEqual(['console', 5]);
    expect(readFileSync(path, 'latin1')).toBe('serial');
  });

  test('none: there is no such device', async () => {
    const { code, stdout } = await cli(['run', '--kernel', says('nobody')]);
    expect([stdout, code]).toEqual(['', 5]);
  });

  test('a file that cannot be written is one line and 73', async () => {
    const path = join(folder, 'missing', 'file');
    const args = ['run', '--kernel', silent(), '--port', `name=log,file=${path}`];
    const { code, stderr } = await cli(args);
    expect(stderr).toMatch(/^tsvisor: --port log: cannot write: [^\n]*\n$/);
    expect(code).toBe(73);
  });

  test('a closed stdout ends it', async () => {
    const child = startCli(['run', '--kernel', repeats('x'), '--console', 'stdio']);
    child.stdout.once('data', () => child.stdout.destroy());
    const code = await new Promise((resolve) => child.on('exit', resolve));
    expect(code).toBe(141);
  });
});

describeKvm('a socket', () => {
  const start = async (path: string, kernel: string, more: readonly string[] = []) => {
    const child = startCli(['run', '--kernel', kernel, '--serial', 'none', '--port', `name=x,socket=${path}`, ...more]);
    const result = finish(child);
    await Promise.race([appears(path), result]);
    return { child, result };
  };

  test('is this user’s alone, and removed at the end', async () => {
    const path = join(folder, 'mode');
    const { child, result } = await start(path, silent());
    expect(statSync(path).isSocket()).toBe(true);
    expect(statSync(path).mode & 0o777).toBe(0o600);
    child.kill('SIGTERM');
    expect(await result).toMatchObject({ code: 143, stderr: '' });
    expect(existsSync(path)).toBe(false);
  });

  test('is removed when the guest ends too, and two may be had', async () => {
    const paths = [join(folder, 'one'), join(folder, 'two')] as const;
    const { result } = await start(paths[0], says('text'), ['--port', `name=y,socket=${paths[1]}`]);
    expect((await result).code).toBe(5);
    for (const path of paths) expect(existsSync(path)).toBe(false);
  });

  test('is not made where there is something, which stays', async () => {
    const path = join(folder, 'taken');
    writeFileSync(path, 'mine');
    const { code, stderr } = await cli(['run', '--kernel', silent(), '--port', `name=x,socket=${path}`]);
    expect(stderr).toMatch(/^tsvisor: --port x: cannot make the socket .*taken: there is something of that name\n$/);
    expect(code).toBe(73);
    expect(readFileSync(path, 'latin1')).toBe('mine');

    const used = join(folder, 'used');
    const { child, result } = await start(used, silent());
    expect((await cli(['run', '--kernel', silent(), '--console', `socket:${used}`])).code).toBe(73);
    expect(statSync(used).isSocket()).toBe(true);
    child.kill('SIGINT');
    await result;
  });

  test('a folder that is missing, and a path that is too long', async () => {
    for (const [path, reason] of [
      [join(folder, 'missing', 'socket'), /there is no folder .*missing\n$/],
      [join(folder, 'long'.repeat(30)), /longer than 107 bytes\n$/],
    ] as const) {
      const { code, stderr } = await cli(['run', '--kernel', silent(), '--console', `socket:${path}`]);
      expect(stderr).toMatch(/^tsvisor: --console: cannot make the socket [^\n]*\n$/);
      expect(stderr).toMatch(reason);
      expect(code).toBe(73);
    }
  });

  test('gives a client what was said before it came, and its end with the guest’s', async () => {
    const path = join(folder, 'late');
    const kernel = guestProgram(`${print('early')}${twoSeconds}mov al, 5\nout DEBUG_EXIT, al`);
    const { result } = await start(path, kernel);
    await delay(100);
    const client = new Client(path);
    await client.closed;
    expect(client.text).toBe('early');
    expect((await result).code).toBe(5);
  });

  test('is one client’s at a time; the next goes on where it left', async () => {
    const path = join(folder, 'clients');
    const { child, result } = await start(path, repeats('tick '));
    const first = new Client(path);
    await first.until(/tick tick/);
    const second = new Client(path);
    await second.closed;
    expect(second.text).toBe('');
    for (let i = 0; i < 15; i++) {
      first.socket.destroy();
      const next = new Client(path);
      // Until the first one's end is noticed, this one is turned away.
      const turnedAway = await Promise.race([next.closed.then(() => true), next.until(/tick/).then(() => false)]);
      if (turnedAway) await delay(20);
      else next.socket.destroy();
      await next.closed;
    }
    const last = new Client(path);
    await last.until(/tick/);
    child.kill('SIGTERM');
    expect(await result).toMatchObject({ code: 143, stderr: '' });
    await last.closed;
  });

  test('a client that does not read does not keep a signal from ending it', async () => {
    const path = join(folder, 'stuck');
    const { child, result } = await start(path, repeats('0123456789'.repeat(100)));
    const client = connect(path);
    client.on('error', () => {});
    await delay(1000);
    child.kill('SIGTERM');
    expect(await Promise.race([result, delay(60_000)])).toMatchObject({ code: 143 });
    expect(existsSync(path)).toBe(false);
    client.destroy();
  });
});
