import { execFile } from 'node:child_process';
import { setTimeout as delay } from 'node:timers/promises';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type DeviceHandle, Machine } from '#dist/index.js';
import { serveObject } from '../examples/object-fs/server.js';
import { Console } from '../support/console.js';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';

const BOOT = 120_000;
const SLOW = 200_000;
const MOUNT = 'mkdir /mnt; mount -t 9p -o trans=virtio,version=9p2000.L object /mnt';

describeKvm('Linux with devices that a program brought', () => {
  let machine: Machine;
  let shell: Console;
  let counter: DeviceHandle;
  const tree: Parameters<typeof serveObject>[1] = {
    'hello.txt': 'Hello from an object.\n',
    'bytes.bin': Uint8Array.from({ length: 20_000 }, (_, i) => i * 7),
    folder: {
      'slow.txt': () => delay(50, `answered late, ${6 * 7}\n`),
      'broken.txt': () => Promise.reject(new Error()),
    },
  };
  const run = async (command: string) => {
    const printed = await shell.run(command, SLOW / 1e3);
    return printed.slice(printed.indexOf('\n') + 1, printed.lastIndexOf('\n') + 1).replaceAll('\r', '');
  };

  beforeAll(async () => {
    machine = await Machine.create({
      ...defaultGuest(),
      rng: true,
      terminal: { type: 'dumb', rows: 24, columns: 250 },
      devices: [
        { module: 'test/examples/object-fs/device.js', name: 'object', options: { tag: 'object' } },
        { module: new URL('../examples/counter/device.js', import.meta.url), name: 'counter' },
      ],
    });
    serveObject(machine.device('object'), tree);
    counter = machine.device('counter');
    shell = new Console(machine.serial);
    await machine.start();
    await shell.prompt(BOOT / 1e3);
    await run(MOUNT);
  }, BOOT);
  afterAll(() => machine?.close());

  test('lists the object', { timeout: SLOW }, async () => {
    expect(await run('ls -1p /mnt /mnt/folder')).toBe(
      '/mnt:\nbytes.bin\nfolder/\nhello.txt\n\n/mnt/folder:\nbroken.txt\nslow.txt\n',
    );
  });

  test('reads text, bytes, and what a function of the program promises', { timeout: SLOW }, async () => {
    expect(await run('cat /mnt/hello.txt /mnt/folder/slow.txt')).toBe('Hello from an object.\nanswered late, 42\n');
    tree['hello.txt'] = 'Changed.\n';
    expect(await run('cat /mnt/hello.txt; wc -c </mnt/bytes.bin')).toBe('Changed.\n20000\n');
    expect(await run('tail -c 3 /mnt/bytes.bin | hexdump -ve \'1/1 "%d "\'; echo')).toBe(
      `${[19_997, 19_998, 19_999].map((i) => (i * 7) & 0xff).join(' ')} \n`,
    );
    expect(await run('cat /mnt/folder/broken.txt')).toMatch(/Input\/output error/);
    expect(await run('cat /mnt/none')).toMatch(/No such file/);
  });

  test('writes into it', { timeout: SLOW }, async () => {
    await run('mkdir /mnt/new; echo one >/mnt/new/file; echo two >>/mnt/new/file; sync; echo x >/mnt/hello.txt');
    expect(String((tree.new as typeof tree).file)).toBe('one\ntwo\n');
    expect(String(tree['hello.txt'])).toBe('x\n');
    expect(await run('rm -r /mnt/new; ls -1 /mnt')).toBe('bytes.bin\nfolder\nhello.txt\n');
    expect(tree.new).toBeUndefined();
    expect(await run('echo x >/mnt/folder/slow.txt')).toMatch(/Permission denied/);
    expect(await run('echo x >/mnt/__proto__; cat /mnt/__proto__; rm /mnt/__proto__')).toBe('x\n');
    expect(Object.getPrototypeOf(tree)).toBe(Object.prototype);
  });

  test('finds the counter on its command line and uses it with devmem', { timeout: SLOW }, async () => {
    const at = (offset: number) => `0x${(counter.address + offset).toString(16)}`;
    const found = await run('cat /proc/cmdline');
    expect(found).toContain(`tsvisor.device=counter@${at(0)}:${counter.interrupt}`);
    const alarm = counter[Symbol.asyncIterator]().next();
    expect(await run(`devmem ${at(0)} 32 40; devmem ${at(4)} 32 42; devmem ${at(0)}`)).toBe('0x00000028\n');
    counter.postMessage(1);
    counter.postMessage(1);
    expect(await alarm).toEqual({ done: false, value: { alarm: 42 } });
    expect(await run(`devmem ${at(0)} 8; devmem ${at(8)}; devmem ${at(8)} 32 1; devmem ${at(8)}`)).toBe(
      '0x2A\n0x00000001\n0x00000000\n',
    );
  });

  test('has them as before after a reset', { timeout: BOOT + SLOW }, async () => {
    machine.serial.write('reboot\n');
    await shell.prompt(BOOT / 1e3);
    await run(MOUNT);
    expect(await run('cat /mnt/hello.txt /mnt/folder/slow.txt')).toBe('x\nanswered late, 42\n');
    expect(await run(`devmem 0x${counter.address.toString(16)}`)).toBe('0x00000000\n');
  });
});

describeKvm('the examples of docs/devices.md run', () => {
  const example = async (path: string) => {
    const { stdout } = await promisify(execFile)(process.execPath, [`test/examples/${path}`], { timeout: SLOW });
    return stdout.replaceAll('\r', '');
  };

  test('object-fs', { timeout: SLOW }, async () => {
    const printed = await example('object-fs/main.js');
    expect(printed).toMatch(/\nHello from an object\.\n20\d\d-\d\d-\d\dT.*Z\n/);
    expect(printed).toMatch(/\nThe guest wrote: \{"kernel":"Linux .*\\n"\}\n$/);
  });

  test('counter', { timeout: SLOW }, async () => {
    const printed = await example('counter/main.js');
    expect(printed).toMatch(/\n0x00000028\n/);
    expect(printed).toMatch(/\nThe counter says \{"alarm":42\}\n/);
    expect(printed).toMatch(/\n0x00000001\n/);
  });
});
