import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type DeviceHandle, Machine } from '#dist/index.js';
import { serveObject } from '../examples/object-fs/server.js';
import { describeKvm } from '../support/kvm.js';

const BOOT = 600_000;
const SLOW = 300_000;
const MOUNT = 'mkdir /mnt && mount -t 9p -o trans=virtio,version=9p2000.L object /mnt';

describeKvm('Linux with devices that a program brought', () => {
  let machine: Machine;
  let counter: DeviceHandle;
  const tree: Parameters<typeof serveObject>[1] = {
    'hello.txt': 'Hello from an object.\n',
    'bytes.bin': Uint8Array.from({ length: 20_000 }, (_, i) => i * 7),
    folder: {
      'slow.txt': () => delay(50, `answered late, ${6 * 7}\n`),
      'broken.txt': () => Promise.reject(new Error()),
    },
  };
  const run = async (command: string) => (await machine.exec(`{ ${command}; } 2>&1`)).stdout;
  const register = (offset: number) => `0x${(counter.address + offset).toString(16)}`;

  beforeAll(async () => {
    machine = await Machine.create({
      rng: true,
      devices: [
        { module: 'test/examples/object-fs/device.js', name: 'object', options: { tag: 'object' } },
        { module: new URL('../examples/counter/device.js', import.meta.url), name: 'counter' },
      ],
    });
    serveObject(machine.device('object'), tree);
    counter = machine.device('counter');
    await machine.start();
    expect(await run(MOUNT)).toBe('');
  }, BOOT);
  afterAll(() => machine?.close());

  test('lists the object', { timeout: SLOW }, async () => {
    expect(await run('ls -p /mnt /mnt/folder')).toBe(
      '/mnt:\nbytes.bin\nfolder/\nhello.txt\n\n/mnt/folder:\nbroken.txt\nslow.txt\n',
    );
  });

  test('reads text, bytes, and what a function of the program promises', { timeout: SLOW }, async () => {
    expect(await run('cat /mnt/hello.txt /mnt/folder/slow.txt')).toBe('Hello from an object.\nanswered late, 42\n');
    tree['hello.txt'] = 'Changed.\n';
    expect(await run('cat /mnt/hello.txt')).toBe('Changed.\n');
    const { stdout } = await machine.exec('cat /mnt/bytes.bin', { encoding: 'buffer' });
    expect(stdout.equals(tree['bytes.bin'] as Uint8Array)).toBe(true);
    expect(await run('cat /mnt/folder/broken.txt')).toMatch(/Input\/output error/);
    expect(await run('cat /mnt/none')).toMatch(/No such file/);
  });

  test('writes into it', { timeout: SLOW }, async () => {
    await run('mkdir /mnt/new; echo one >/mnt/new/file; echo two >>/mnt/new/file; echo x >/mnt/hello.txt');
    expect(String((tree.new as typeof tree).file)).toBe('one\ntwo\n');
    expect(String(tree['hello.txt'])).toBe('x\n');
    expect(await run('rm -r /mnt/new; ls /mnt')).toBe('bytes.bin\nfolder\nhello.txt\n');
    expect(tree.new).toBeUndefined();
    expect(await run('echo x >/mnt/folder/slow.txt')).toMatch(/Permission denied/);
    expect(await run('echo x >/mnt/__proto__; cat /mnt/__proto__; rm /mnt/__proto__')).toBe('x\n');
    expect(Object.getPrototypeOf(tree)).toBe(Object.prototype);
  });

  test('finds the counter on its command line and uses it with devmem', { timeout: SLOW }, async () => {
    expect(await run('cat /proc/cmdline')).toContain(`tsvisor.device=counter@${register(0)}:${counter.interrupt}`);
    const alarm = counter[Symbol.asyncIterator]().next();
    expect(await run(`devmem ${register(0)} 32 40; devmem ${register(4)} 32 42; devmem ${register(0)}`)).toBe(
      '0x00000028\n',
    );
    counter.postMessage(1);
    counter.postMessage(1);
    expect(await alarm).toEqual({ done: false, value: { alarm: 42 } });
    const status = register(8);
    expect(await run(`devmem ${register(0)} 8; devmem ${status}; devmem ${status} 32 1; devmem ${status}`)).toBe(
      '0x2A\n0x00000001\n0x00000000\n',
    );
  });

  test('has them as before after a reset', { timeout: BOOT + SLOW }, async () => {
    const reset = once(machine, 'reset');
    machine.serial.write('reboot\n');
    await reset;
    expect(await run(`${MOUNT} && cat /mnt/hello.txt /mnt/folder/slow.txt`)).toBe('x\nanswered late, 42\n');
    expect(await run(`devmem ${register(0)}`)).toBe('0x00000000\n');
  });
});

describeKvm('the examples of docs/devices.md run', () => {
  for (const [path, expected] of [
    ['object-fs', /^The guest read:\nHello from an object\.\n20\d\d-\d\d-\d\dT.*Z\nThe guest wrote:\nLinux \d.*\n$/],
    [
      'counter',
      /^The guest set the counter to 0x00000028\nThe counter says {"alarm":42}\nThe guest finds .* 0x00000001\n$/,
    ],
  ] as const) {
    test(path, { timeout: SLOW }, async () => {
      const { stdout } = await promisify(execFile)(process.execPath, [`test/examples/${path}/main.js`]);
      expect(stdout).toMatch(expected);
    });
  }
});
