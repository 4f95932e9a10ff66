import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { chmodSync, copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Machine, type MachineConfig } from '#dist/index.js';
import { defaultGuest, rootfs } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
const BOOT = 600_000;
const OPERATION = 300_000;

async function boot(config: MachineConfig): Promise<Machine> {
  const machine = await Machine.create(config);
  await machine.start();
  try {
    await machine.ready({ timeout: BOOT });
  } catch (error) {
    await machine.close();
    throw error;
  }
  return machine;
}

describeKvm('the agent in the default guest', () => {
  let machine: Machine;
  beforeAll(async () => {
    machine = await boot({});
  }, BOOT);
  afterAll(() => machine?.close());

  it('runs commands and programs', { timeout: OPERATION }, async () => {
    expect(await machine.exec('echo out; echo err >&2; pwd; exit 3')).toEqual({
      code: 3,
      signal: null,
      stdout: 'out\n/root\n',
      stderr: 'err\n',
    });
    expect((await machine.exec('id', { args: ['-un'], user: 'nobody' })).stdout).toBe('nobody\n');
    await expect(machine.exec('nothing', { args: [] })).rejects.toMatchObject({ code: 'ERR_EXEC', errno: 'ENOENT' });
    await expect(machine.exec('sleep 1000', { timeout: 500 })).rejects.toMatchObject({ code: 'ERR_TIMEOUT' });
  });

  it('hears of each interrupt of a device once', { timeout: OPERATION }, async () => {
    const handled = async () => {
      const { stdout } = await machine.exec('cat /proc/interrupts');
      return Number(/^ *\d+: +(\d+).*virtio0$/m.exec(stdout)?.[1]);
    };
    const raised = async () => (await machine.metrics()).devices.vsock?.interrupts ?? Number.NaN;
    const raisedBefore = await raised();
    const handledBefore = await handled();
    for (let i = 0; i < 5; i++) await machine.exec('true');
    const handledSince = (await handled()) - handledBefore;
    expect(handledSince).toBeGreaterThan(10);
    expect(handledSince).toBeLessThanOrEqual((await raised()) - raisedBefore);
  });

  it('has terminals', { timeout: OPERATION }, async () => {
    expect((await machine.exec('stty size; tty', { tty: { rows: 40, columns: 100 } })).stdout).toBe(
      '40 100\r\n/dev/pts/0\r\n',
    );
  });

  it('carries a mebibyte through a process, and files and trees', { timeout: OPERATION }, async () => {
    const data = randomBytes(1 << 20);
    const { stdout } = await machine.exec('cat', { args: [], stdin: data, encoding: 'buffer' });
    expect(stdout.equals(data)).toBe(true);
    mkdirSync(join(folder, 'tree/sub'), { recursive: true });
    writeFileSync(join(folder, 'tree/sub/data'), data.subarray(0, 100_000), { mode: 0o640 });
    await machine.fs.copyIn(join(folder, 'tree'), '/root/tree');
    expect((await machine.exec('ls -l /root/tree/sub/data')).stdout).toMatch(/^-rw-r----- .* 100000 /);
    await machine.fs.copyOut('/root/tree', join(folder, 'back'));
    expect(readFileSync(join(folder, 'back/sub/data')).equals(data.subarray(0, 100_000))).toBe(true);
    await machine.fs.writeFile('/proc/sys/kernel/hostname', 'renamed');
    expect((await machine.exec('hostname')).stdout).toBe('renamed\n');
  });

  it('runs 100 one after the other, and 8 at once', { timeout: 6 * OPERATION }, async () => {
    const say = join(folder, 'say');
    execFileSync('gcc', ['-O2', '-static', '-nostdlib', '-s', '-o', say, 'test/guest/programs/say.c']);
    await machine.fs.writeFile('/tmp/say', readFileSync(say), { mode: 0o755 });
    for (let i = 0; i < 100; i++) {
      const { stdout } = await machine.exec('/tmp/say', { args: [String(i)] });
      expect(stdout).toBe(`${i}\n`);
    }
    const codes = Array.from({ length: 8 }, (_, i) => machine.exec(`sleep 1; exit ${i}`));
    expect((await Promise.all(codes)).map(({ code }) => code)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
  });

  it('ends by signals, its own and those that are sent', { timeout: OPERATION }, async () => {
    expect(await machine.exec('kill -SEGV $$')).toMatchObject({ code: null, signal: 'SIGSEGV' });
    const sleeper = await machine.spawn('sleep', { args: ['1000'] });
    await sleeper.kill('SIGUSR1');
    expect(await sleeper.exited).toEqual({ code: null, signal: 'SIGUSR1' });
  });

  it('sets the clock', { timeout: OPERATION }, async () => {
    await machine.exec('date -s 2001-01-01');
    await machine.syncTime();
    const { stdout } = await machine.exec('date +%s');
    expect(Math.abs(Number(stdout) - Date.now() / 1000)).toBeLessThan(60);
  });

  it('is started again when it is killed', { timeout: OPERATION }, async () => {
    const agent = () => machine.exec("ps | grep '[t]svisor-agent' | head -n 1");
    const pid = Number.parseInt((await agent()).stdout.trim(), 10);
    await machine.exec(`kill -9 ${pid}`).catch(() => {});
    await expect
      .poll(
        () =>
          agent()
            .then(({ stdout }) => Number.parseInt(stdout.trim(), 10))
            .catch(() => pid),
        { timeout: OPERATION, interval: 500 },
      )
      .not.toBe(pid);
  });

  it('powers the machine off', { timeout: OPERATION }, async () => {
    expect(await machine.stop({ graceful: true })).toMatchObject({ reason: 'guest-shutdown' });
  });
});

/** The agent may be there before the image's init has done its part. */
async function untilThere(machine: Machine, path: string): Promise<void> {
  const there = () =>
    machine.fs.stat(path).then(
      () => true,
      () => false,
    );
  await expect.poll(there, { timeout: OPERATION, interval: 500 }).toBe(true);
}

/** An initramfs archive. @param manifest lines for guest-images/init/cpio.mjs; @param files contents by name, added to it */
function archive(manifest: readonly string[], files: Record<string, string> = {}): Buffer {
  const lines = [...manifest];
  for (const [name, text] of Object.entries(files)) {
    writeFileSync(join(folder, name), text);
    lines.push(`file ${name} 755 ${join(folder, name)}`);
  }
  writeFileSync(join(folder, 'manifest'), `${lines.join('\n')}\n`);
  const command = ['guest-images/init/cpio.mjs', join(folder, 'manifest')];
  return execFileSync(process.execPath, command, { maxBuffer: 2 ** 28 });
}

const BUSYBOX = ['dir bin 755', 'dir dev 755', 'char dev/console 600 5 1', 'file bin/busybox 755 /bin/busybox'];

function file(name: string, contents: Uint8Array): string {
  const path = join(folder, name);
  writeFileSync(path, contents);
  return path;
}

describeKvm('the agent in other images', () => {
  const disk = join(folder, 'disk.img');
  let kernel: string;
  beforeAll(() => {
    kernel = defaultGuest().kernel;
    copyFileSync(rootfs(), disk);
    chmodSync(disk, 0o600);
  }, BOOT);

  it('is brought into an initramfs, and leaves its init as it is', { timeout: BOOT + OPERATION }, async () => {
    const init =
      '#!/bin/busybox sh\n/bin/busybox mkdir -p /proc\n/bin/busybox --install -s /bin\nmount -t proc proc /proc\n' +
      'echo "$@" >/arguments\nwhile :; do sleep 1000; done\n';
    const initrd = file('foreign.cpio', archive(BUSYBOX, { init }));
    await using machine = await boot({ kernel, initrd, agent: true, append: '-- one two' });
    await untilThere(machine, '/arguments');
    expect((await machine.exec('cat /proc/1/cmdline')).stdout).toBe('/bin/busybox\0sh\0/init\0one\0two\0');
    expect((await machine.exec('ls -A /; cat /arguments')).stdout).toBe(
      'arguments\nbin\ndev\ninit\nproc\nroot\none two\n',
    );
    // This init takes no signal to power off by.
    expect(await machine.stop({ graceful: true })).toMatchObject({ reason: 'guest-shutdown' });
  });

  it('is brought onto a disk that has no initramfs', { timeout: BOOT + OPERATION }, async () => {
    await using machine = await boot({ kernel, drives: [{ file: disk }], agent: true, append: 'root=/dev/vda rw' });
    expect((await machine.exec('grep " / " /proc/mounts; cat /proc/1/comm')).stdout).toMatch(/ext4 rw.*\ninit\n$/s);
    expect(await machine.stop({ graceful: true })).toMatchObject({ reason: 'guest-shutdown' });
  });

  it('goes with an initramfs that moves on to a disk', { timeout: BOOT + OPERATION }, async () => {
    const start =
      '#!/bin/busybox sh\n/bin/busybox mkdir -p /new\n/bin/busybox mount -t devtmpfs dev /dev\n' +
      '/bin/busybox mount -t ext4 /dev/vda /new\nexec /bin/busybox switch_root /new /bin/init\n';
    // Packed, so that what follows the agent's archive is not one of its kind; what is large is not: it would take minutes.
    const packed = gzipSync(archive([], { start, init: 'not to be run: rdinit= is\n' }));
    const padding = Buffer.alloc(-packed.length & 3);
    const initrd = file('switch.cpio', Buffer.concat([packed, padding, archive(BUSYBOX)]));
    const drives = [{ file: disk }];
    await using machine = await boot({ kernel, initrd, drives, agent: true, append: 'rdinit=/start' });
    await untilThere(machine, '/etc/profile');
    expect((await machine.exec('grep " / " /proc/mounts; cat /proc/1/comm')).stdout).toMatch(/ext4.*\ninit\n$/s);
  });
});
