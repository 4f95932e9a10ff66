import { execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Machine, type MachineConfig } from '#dist/index.js';
import { Random } from '../kvm/assist/random.js';
import { cliPath } from '../support/cli.js';
import { Console } from '../support/console.js';
import { defaultGuest, guestWithPrograms } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';

const BOOT = 600_000;
/** For what a guest does that goes on from a snapshot. */
const OPERATION = 300_000;
const MiB = 2 ** 20;

let folder: string;
const path = (name: string) => join(folder, name);
const sha256 = (file: string) => createHash('sha256').update(readFileSync(file)).digest('hex');

/** A sparse image of zeroes. */
function blank(name: string, size: number): string {
  writeFileSync(path(name), '');
  truncateSync(path(name), size);
  return path(name);
}

/** An image with bytes of its own, incompressible and repeatable. */
function filled(name: string, size: number, seed: number): string {
  const random = new Random(seed);
  const words = new Uint32Array(size / 4).map(() => random.u32());
  writeFileSync(path(name), words);
  return path(name);
}

function makeExt4(image: string, ...options: string[]): string {
  execFileSync('mkfs.ext4', ['-q', '-F', ...options, image], {
    env: { ...process.env, PATH: `${process.env.PATH}:/sbin` },
  });
  return image;
}

/** The drive that a base and its overlay make, as a raw image: by the format in overlay-file.ts, not by its code. */
function flattened(base: string, overlay: string, into: string): string {
  const CLUSTER = 4096;
  const [disk, file] = [readFileSync(base), readFileSync(overlay)];
  const clusters = disk.length / CLUSTER;
  const dataOffset = CLUSTER + Math.ceil(clusters / 8 / CLUSTER) * CLUSTER;
  for (let i = 0; i < clusters; i++) {
    if (((file[CLUSTER + (i >> 3)] as number) >> (i & 7)) & 1) {
      file.copy(disk, i * CLUSTER, dataOffset + i * CLUSTER, dataOffset + (i + 1) * CLUSTER);
    }
  }
  writeFileSync(into, disk);
  return into;
}

/** What fsck says of a file system without changing it; throws when it is not clean. */
function fsck(image: string): string {
  return execFileSync('/sbin/e2fsck', ['-f', '-n', image], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

/** An image with the host's mke2fs and its libraries in it. */
function toolsImage(): string {
  const tree = path('tools');
  mkdirSync(tree);
  const libraries = execFileSync('ldd', ['/sbin/mke2fs'], { encoding: 'utf8' }).matchAll(/(\/\S+) \(0x/g);
  for (const [, library] of libraries)
    copyFileSync(library as string, join(tree, (library as string).replace(/.*\//, '')));
  copyFileSync('/sbin/mke2fs', join(tree, 'mke2fs'));
  return makeExt4(blank('tools.img', 16 * MiB), '-b', '4096', '-O', '^has_journal', '-d', tree);
}

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'tsvisor-disk-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

async function boot(config: Partial<MachineConfig>): Promise<{ machine: Machine; shell: Console }> {
  const machine = await Machine.create({ ...defaultGuest(), ...config });
  const shell = new Console(machine.serial);
  await machine.start();
  await shell.prompt(BOOT / 1e3);
  return { machine, shell };
}

describeKvm('drives in Linux', () => {
  test('an ext4 made, filled and checksummed; a read-only drive; an overlay; a discard; a full disk', {
    timeout: 3 * BOOT,
  }, async () => {
    const data = blank('data.img', 96 * MiB);
    const readOnly = toolsImage();
    const base = filled('base.img', 4 * MiB, 1);
    const discarded = filled('discarded.img', 8 * MiB, 2);
    const before = { readOnly: sha256(readOnly), base: sha256(base), blocks: statSync(discarded).blocks };
    const overlay = path('overlay');
    const drives = [
      { file: data },
      { file: readOnly, readOnly: true, id: 'the-tools' },
      { file: base, overlay },
      { file: discarded },
    ];
    const { machine, shell } = await boot({ drives });
    await using _ = machine;

    expect(await shell.run('cat /sys/block/vdb/serial')).toContain('the-tools');
    await shell.run('mkdir /tools /data; mount -o ro /dev/vdb /tools');
    const mke2fs =
      'LD_LIBRARY_PATH=/tools /tools/ld-linux-x86-64.so.2 /tools/mke2fs -q -t ext4 -b 4096 /dev/vda; echo made $?';
    expect(await shell.run(mke2fs)).toContain('made 0');
    await shell.run('mount -o rw,discard /dev/vda /data');
    // In large pieces and blocks: an interpreted kernel takes milliseconds for each.
    const fill = 'for i in 1 2 3; do dd if=/tools/libc.so.6 of=/data/$i bs=128k skip=$i count=1; done 2>/dev/null';
    await shell.run(`${fill}; cat /tools/mke2fs >/data/mke2fs`);
    const sums = await shell.run('cd /data; sha256sum 1 2 3 mke2fs | tee sums; cd /');
    const made = new Map([...sums.matchAll(/([0-9a-f]{64}) {2}(\S+)/g)].map(([, sum, name]) => [name, sum]));
    expect(made.size).toBe(4);
    expect(made.get('mke2fs')).toBe(sha256('/sbin/mke2fs'));

    expect(await shell.run('dd if=/dev/zero of=/dev/vdb bs=4k count=1; echo wrote $?')).toMatch(/wrote 1/);
    const patch = 'dd if=/dev/zero of=/dev/vdc bs=512 seek=9 count=3 conv=fsync 2>/dev/null; sha256sum /dev/vdc';
    const patched = readFileSync(base).fill(0, 9 * 512, 12 * 512);
    expect(await shell.run(patch)).toContain(createHash('sha256').update(patched).digest('hex'));
    expect(await shell.run('blkdiscard -o 1048576 -l 4194304 /dev/vdd; echo discarded $?')).toContain('discarded 0');

    machine.serial.write('poweroff\n');
    expect(await machine.wait()).toMatchObject({ reason: 'guest-shutdown' });
    expect(fsck(data)).toMatch(/data\.img: \d+\/\d+ files/);
    for (const [name, sum] of made) {
      execFileSync('/sbin/debugfs', ['-R', `dump /${name} ${path('dumped')}`, data], { stdio: 'ignore' });
      expect(sha256(path('dumped')), name).toBe(sum);
    }
    expect(sha256(readOnly)).toBe(before.readOnly);
    expect(sha256(base)).toBe(before.base);
    expect(statSync(discarded).blocks).toBeLessThanOrEqual(before.blocks - (4 * MiB) / 512);
    // What the overlay holds is there for the next machine, which lives on when another disk is full.
    const mount = path('small');
    mkdirSync(mount);
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mount]);
    try {
      const full = blank('small/image', 8 * MiB);
      const again = await boot({ drives: [{ file: base, overlay }, { file: full }] });
      await using _again = again.machine;
      const output = await again.shell.run('dd if=/dev/zero of=/dev/vdb bs=64k count=64 conv=fsync; echo wrote $?');
      expect(output).toMatch(/Input\/output error|No space left/);
      expect(output).toMatch(/wrote 1/);
      expect(await again.shell.run('sha256sum /dev/vda')).toContain(createHash('sha256').update(patched).digest('hex'));
    } finally {
      execFileSync('umount', [mount]);
    }
  });

  test('boots from its disk and keeps its data', { timeout: 2 * BOOT }, async () => {
    const image = path('root.img');
    const rootfs = execFileSync(process.execPath, [cliPath, 'rootfs', 'path'], { encoding: 'utf8' }).trim();
    execFileSync('cp', ['--sparse=always', '--no-preserve=mode', rootfs, image]);
    const { kernel } = defaultGuest();
    const config: MachineConfig = { kernel, drives: [{ file: image }], append: 'root=/dev/vda rw' };
    const power = async (command: string) => {
      const machine = await Machine.create(config);
      await using _ = machine;
      const shell = new Console(machine.serial);
      await machine.start();
      await shell.prompt(BOOT / 1e3);
      const output = await shell.run(command);
      machine.serial.write('poweroff\n');
      expect(await machine.wait()).toMatchObject({ reason: 'guest-shutdown' });
      return output;
    };
    await power('echo kept-$((40+2)) >/root/note');
    expect(await power('cat /root/note')).toContain('kept-42');
    expect(fsck(image)).toMatch(/files/);
  });
});

const KILL_POINTS = Number(process.env.TSVISOR_CASES ?? 20);

describeKvm('what the guest has fsynced', () => {
  /** Moments of one guest from which those of the points go on, each with a disk of its own as it was then. */
  const moments: { readonly snapshot: string; readonly disk: string; readonly synced: number }[] = [];

  beforeAll(async () => {
    const disk = makeExt4(blank('template.img', 16 * MiB), '-b', '4096', '-J', 'size=4');
    const { machine, shell } = await boot({ ...guestWithPrograms(folder, ['fsync-log']), drives: [{ file: disk }] });
    await using _ = machine;
    const save = async (synced: number) => {
      const name = `moment-${moments.length}`;
      await machine.pause();
      await machine.snapshot(path(name), { disks: 'reference' });
      copyFileSync(disk, path(`${name}.img`));
      moments.push({ snapshot: path(name), disk: path(`${name}.img`), synced });
      await machine.resume();
    };
    await shell.run('mkdir /d; mount /dev/vda /d');
    await save(-1);
    machine.serial.write('fsync-log /d/log\n');
    await shell.until(/synced 20\./);
    await save(20);
  }, BOOT);

  test(`survives kill -9 of the VMM, at ${KILL_POINTS} random points`, {
    timeout: KILL_POINTS * OPERATION,
  }, async () => {
    const seed = Number(process.env.TSVISOR_SEED ?? Date.now() % 2 ** 32);
    const random = new Random(seed);
    const points = Array.from({ length: KILL_POINTS }, (_, index) => ({
      index,
      overlay: index % 4 === 3,
      moment: moments[index % 3 === 0 ? 0 : 1] as (typeof moments)[number],
      records: 1 + random.below(12),
      // Where KVM interprets the guest a record takes that long: most points lie inside a write, a flush or a commit.
      delay: random.below(150),
    }));
    const check = async ({ index, overlay, moment, records, delay }: (typeof points)[number]) => {
      const image = path(`kill-${index}.img`);
      copyFileSync(moment.disk, image);
      const drive = overlay ? `file=${moment.disk},overlay=${path(`kill-${index}.overlay`)}` : `file=${image}`;
      const args = [cliPath, 'restore', moment.snapshot, '--drive', drive];
      const vmm = spawn(process.execPath, args, { stdio: ['pipe', 'pipe', 'inherit'] });
      if (moment.synced < 0) vmm.stdin.write('fsync-log /d/log\n');
      let output = '';
      const synced = () => Number([...output.matchAll(/synced (\d+)\./g)].at(-1)?.[1] ?? moment.synced);
      await new Promise<void>((resolve, reject) => {
        vmm.stdout.setEncoding('latin1').on('data', (text: string) => {
          output += text;
          if (synced() >= moment.synced + records) setTimeout(resolve, delay);
        });
        vmm.on('exit', () => reject(new Error(`the machine ended by itself:\n${output.slice(-2000)}`)));
      });
      vmm.removeAllListeners('exit');
      const exited = new Promise((resolve) => vmm.on('close', resolve));
      vmm.kill('SIGKILL');
      await exited;
      const promised = synced();

      const disk = overlay ? flattened(moment.disk, path(`kill-${index}.overlay`), path(`flat-${index}.img`)) : image;
      execFileSync('/sbin/e2fsck', ['-y', '-E', 'journal_only', disk], { stdio: 'ignore' });
      fsck(disk);
      execFileSync('/sbin/debugfs', ['-R', `dump /log ${path(`log-${index}`)}`, disk], { stdio: 'ignore' });
      const log = readFileSync(path(`log-${index}`));
      const words = new Uint32Array(log.buffer, log.byteOffset, Math.floor(log.length / 4));
      const whole = Math.floor(log.length / 512);
      expect(whole, `seed ${seed}, point ${index}: records of ${promised + 1}`).toBeGreaterThan(promised);
      for (let record = 0; record <= promised; record++) {
        let word = record;
        for (let i = 0; i < 128; i++) {
          if (words[128 * record + i] !== word)
            throw new Error(`seed ${seed}, point ${index}: record ${record} is torn`);
          word = (Math.imul(word, 1664525) + 1013904223) >>> 0;
        }
      }
      for (const name of [`kill-${index}.img`, `flat-${index}.img`, `kill-${index}.overlay`])
        rmSync(path(name), { force: true });
      return promised;
    };
    const promises: number[] = [];
    for (const point of points) promises.push(await check(point));
    expect(promises).toHaveLength(KILL_POINTS);
    expect(Math.max(...promises)).toBeGreaterThan(20);
  });
});
