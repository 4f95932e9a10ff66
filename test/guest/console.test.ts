import { spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Machine, UsageError } from '#dist/index.js';
import { cliPath } from '../support/cli.js';
import { Console } from '../support/console.js';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { Pty } from '../support/pty.js';

const BOOT = 600_000;
/** For a guest that moves much, on a host that is busy. */
const SLOW = 300_000;
const md5 = (bytes: Uint8Array) => createHash('md5').update(bytes).digest('hex');
/** Prints where each port is, by its name. */
const FIND_PORTS = 'grep . /sys/class/virtio-ports/*/name';
/** The path of the port of that name in what FIND_PORTS printed. */
const portIn = (text: string, name: string) =>
  `/dev/${new RegExp(`virtio-ports/(\\w+)/name:${name}\\r`).exec(text)?.[1]}`;

/** So many bytes of a stream. */
async function take(stream: Duplex, length: number): Promise<Buffer> {
  const parts: Buffer[] = [];
  let total = 0;
  for await (const chunk of stream.iterator({ destroyOnReturn: false })) {
    parts.push(chunk);
    total += chunk.length;
    if (total >= length) break;
  }
  return Buffer.concat(parts);
}

describeKvm('Linux with a serial console, an hvc and two named ports', () => {
  let machine: Machine;
  let shell: Console;
  let agent: string;
  let log: string;
  const run = (command: string) => shell.run(command, SLOW / 1e3);

  beforeAll(async () => {
    machine = await Machine.create({
      ...defaultGuest(),
      rng: true,
      consolePorts: [{ name: 'terminal', console: true }, { name: 'org.example.agent' }, { name: 'log' }],
    });
    await machine.resizeConsole('terminal', { rows: 31, columns: 97 });
    shell = new Console(machine.serial);
    await machine.start();
    await shell.prompt(BOOT / 1e3);
    const found = await run(FIND_PORTS);
    [agent, log] = [portIn(found, 'org\\.example\\.agent'), portIn(found, 'log')];
  }, BOOT);
  afterAll(() => machine?.close());

  test('finds the ports by their names, and the console on ttyS0', { timeout: SLOW }, async () => {
    expect(await run('cat /proc/consoles')).toMatch(/^ttyS0.*\r\n[^h]*$/m);
    expect(agent).toMatch(/^\/dev\/vport\d+p1$/);
    expect(log).toMatch(/^\/dev\/vport\d+p2$/);
  });

  test('has two shells at once', { timeout: SLOW }, async () => {
    const second = new Console(machine.port('terminal'));
    await run('setsid sh -c "exec sh -i </dev/hvc0 >/dev/hvc0 2>&1" &');
    await second.prompt();
    machine.port('terminal').write('echo second-$((40+2))\n');
    machine.serial.write('echo first-$((40+1))\n');
    await second.until(/second-42/);
    await shell.until(/first-41/);
    await second.prompt();
    await shell.prompt();
  });

  test('the size of the terminal is the host’s, from the beginning and when it changes', {
    timeout: SLOW,
  }, async () => {
    expect(await run('stty size </dev/hvc0')).toMatch(/^31 97\r$/m);
    await machine.resizeConsole('terminal', { rows: 50, columns: 132 });
    await delay(500);
    expect(await run('stty size </dev/hvc0')).toMatch(/^50 132\r$/m);
  });

  test('a port echoes 256 KiB while it is read and written at once', { timeout: SLOW }, async () => {
    const host = machine.port('org.example.agent');
    const data = randomBytes(256 * 1024);
    await run(`exec 3<>${agent}; cat <&3 >&3 &`);
    await delay(500);
    host.write(data);
    const echoed = await take(host, data.length);
    expect(md5(echoed)).toBe(md5(data));
    await run('kill $!; wait $!; exec 3>&-'); // what a reader that ends has not read is lost
  });

  test('a reader that is late finds all that was written', { timeout: SLOW }, async () => {
    await run(`head -c 300000 /bin/busybox >/tmp/data; cat /tmp/data >${log} &`);
    const sum = await run('md5sum </tmp/data');
    expect(sum).toContain(md5(await take(machine.port('log'), 300_000)));
  });

  test('has random numbers of the host', { timeout: SLOW }, async () => {
    expect(await run('cat /sys/class/misc/hw_random/rng_current')).toMatch(/virtio_rng\.\d/);
    const read = async () => /[0-9a-f]{8} [0-9a-f ]*/.exec(await run('head -c 16 /dev/hwrng | od -An -tx4'))?.[0];
    const first = await read();
    expect(first).toMatch(/[0-9a-f]{8} [0-9a-f]{8}/);
    expect(await read()).not.toBe(first);
  });

  test('the host names what is wrong', { timeout: SLOW }, async () => {
    expect(() => machine.port('agent')).toThrow(
      new UsageError("there is no console port 'agent'; this machine has terminal, org.example.agent, log"),
    );
    await expect(machine.resizeConsole('log', { rows: 1, columns: 1 })).rejects.toThrow(/'log'.*not a console/);
    for (const rows of [0, -1, 1.5, 65536, Number.NaN]) {
      await expect(machine.resizeConsole('terminal', { rows, columns: 80 })).rejects.toThrow(UsageError);
    }
  });

  test('what it wrote last is read after its end', { timeout: SLOW }, async () => {
    // The queue takes it all, the sockets not.
    machine.serial.write(`dd bs=32k count=32 if=/bin/busybox of=${log}; poweroff -f\n`);
    expect((await machine.wait()).reason).toBe('guest-shutdown');
    expect(await take(machine.port('log'), 1 << 20)).toHaveLength(1 << 20);
  });
});

describeKvm('tsvisor run --console stdio', () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'tsvisor-console-'));
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  test('is a shell on hvc0 of this terminal’s size, which is as before after', { timeout: SLOW }, async () => {
    using pty = new Pty();
    pty.resize(33, 111);
    const before = pty.settings;
    const path = join(folder, 'agent');
    const args = ['run', '--console', 'stdio', '--port', `name=agent,socket=${path}`];
    const child = spawn(process.execPath, [cliPath, ...args], { stdio: [pty.slave, pty.slave, pty.slave] });
    const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
    // biome-ignore lint/suspicious/noControlCharactersInRegex: the shell asks the terminal where its cursor is
    await pty.shows(/# (\x1b\[6n)?$/, BOOT / 1e3);
    expect(pty.settings).not.toBe(before);
    pty.type('stty size; cat /proc/consoles\r');
    await pty.shows(/\n33 111\r+\nhvc0/);
    pty.resize(44, 122);
    child.kill('SIGWINCH');
    await delay(1000);
    pty.type('stty size\r');
    await pty.shows(/\n44 122\r/);

    pty.type(`${FIND_PORTS}\r`);
    await pty.shows(/name:agent\r/);
    pty.type(`exec 3<>${portIn(pty.screen, 'agent')}; cat <&3 >&3 &\r`);
    await delay(1000);
    const client = connect(path);
    client.write('through the guest');
    expect(String(await take(client, 17))).toBe('through the guest');
    client.destroy();

    pty.type('\x01h');
    await pty.shows(/Ctrl-A x/);
    pty.type('sleep 1000\r');
    await pty.interrupt(/\^C.*# /s); // Ctrl-C is the guest's
    pty.type('echo still-$((1+1))\r');
    await pty.shows(/still-2/);
    pty.type('poweroff\r');
    expect(await ended).toBe(0);
    expect(pty.settings).toBe(before);
    expect(existsSync(path)).toBe(false);
  });
});
