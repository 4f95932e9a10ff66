import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  closeSync,
  existsSync,
  linkSync,
  mkdirSync,
  openSync,
  readdirSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openDrives } from '#dist/backends/disk/open-drives.js';
import { addon } from '#dist/kvm/addon.js';
import { temporaryFolder } from '../../support/temporary-folder.js';
import { openDrive, source } from '../../support/virtio/blk-rig.js';

const MiB = 2 ** 20;
const folder = temporaryFolder();
let count = 0;

function image(size = MiB): string {
  const path = join(folder, `${count++}.img`);
  writeFileSync(path, '');
  truncateSync(path, size);
  return path;
}

function descriptors(): number {
  return readdirSync('/proc/self/fd').length;
}

/** The error of opening, which leaves nothing open; its code is checked. */
function problem(open: () => unknown): string {
  const before = descriptors();
  let message = 'none';
  try {
    open();
  } catch (error) {
    expect(error).toMatchObject({ name: 'DriveError', code: 'ERR_DRIVE' });
    ({ message } = error as Error);
  }
  expect(descriptors()).toBe(before);
  expect(message).not.toContain('\n');
  return message;
}

describe('an image that cannot be a drive is refused, with a remedy', () => {
  test('missing', () => {
    const path = join(folder, 'missing.img');
    expect(problem(() => openDrive(path))).toBe(`${path}: no such image; make one with: truncate -s 1G ${path}`);
    expect(problem(() => openDrive(join(path, 'below')))).toMatch(/: no such image/);
    expect(existsSync(path)).toBe(false);
  });

  test('a directory, a FIFO, a terminal, a socket', () => {
    expect(problem(() => openDrive(folder))).toMatch(/: a directory; a drive needs/);
    const fifo = join(folder, 'fifo');
    execFileSync('mkfifo', [fifo]);
    expect(problem(() => openDrive(fifo))).toMatch(/: neither a regular file nor a block device; a drive/);
    expect(problem(() => openDrive(fifo, { readOnly: true }))).toMatch(/: neither a regular file/);
    expect(problem(() => openDrive('/dev/null'))).toMatch(/: neither a regular file/);
    expect(problem(() => openDrive('/dev/full'))).toMatch(/: neither a regular file/);
  });

  test('empty, or with half a sector', () => {
    const empty = image(0);
    expect(problem(() => openDrive(empty))).toBe(`${empty}: empty; give it a size with: truncate -s 1G ${empty}`);
    const odd = image(513);
    expect(problem(() => openDrive(odd))).toBe(
      `${odd}: 513 bytes are not a multiple of 512; grow it with: truncate -s 1024 ${odd}`,
    );
    truncateSync(odd, 1024);
    openDrive(odd).close();
  });

  test('where this user may not', () => {
    const path = image();
    const closed = join(folder, 'closed');
    mkdirSync(closed);
    linkSync(path, join(closed, 'x.img'));
    chmodSync(path, 0o444);
    chmodSync(closed, 0o000);
    chmodSync(folder, 0o755);
    const secret = image();
    chmodSync(secret, 0o000);
    // In a process that is not root's.
    const script = `
      import { openDrives } from ${JSON.stringify(join(process.cwd(), 'dist/backends/disk/open-drives.js'))};
      if (process.getuid() === 0) { process.setgroups([]); process.setgid(65534); process.setuid(65534); }
      for (const [file, readOnly] of ${JSON.stringify([
        [path, false],
        [path, true],
        [secret, true],
        [join(closed, 'x.img'), true],
      ])}) {
        try {
          openDrives([{ file, readOnly, cache: 'writeback', overlay: undefined }]);
          console.log('opened');
        } catch (error) {
          console.log(error.code, error.message);
        }
      }`;
    const output = execFileSync(process.execPath, ['--input-type=module', '-e', script], { encoding: 'utf8' });
    expect(output.trim().split('\n')).toEqual([
      `ERR_DRIVE ${path}: this user may not write it; use it with readonly or with overlay=FILE`,
      'opened',
      `ERR_DRIVE ${secret}: this user may not read it`,
      `ERR_DRIVE ${join(closed, 'x.img')}: no permission to reach this image`,
    ]);
    chmodSync(closed, 0o700);
  });

  test('on a file system without O_DIRECT, with cache=none', () => {
    // proc has regular files, and no O_DIRECT.
    expect(problem(() => openDrive('/proc/self/maps', { readOnly: true }))).toMatch(/: empty/);
    expect(problem(() => openDrive('/proc/self/maps', { readOnly: true, cache: 'none' }))).toMatch(
      /: its file system has no O_DIRECT; use it without cache=none/,
    );
  });
});

describe('drives of one machine', () => {
  test('may not share a file that one of them writes, by whatever name', () => {
    const path = image();
    const other = image();
    symlinkSync(path, `${path}.symlink`);
    linkSync(path, `${path}.link`);
    for (const name of [path, `${path}.symlink`, `${path}.link`]) {
      for (const readOnly of [false, true]) {
        const message = problem(() => openDrives([source(other), source(path), source(name, { readOnly })]));
        expect(message).toBe(`${name}: in use by drives[1] too; give each a file of its own, or make both readonly`);
        expect(problem(() => openDrives([source(name, { readOnly: true }), source(path)]))).toMatch(/drives\[0\] too/);
      }
    }
    const overlay = `${path}.overlay`;
    expect(problem(() => openDrives([source(path, { overlay }), source(other, { overlay })]))).toMatch(
      /overlay: in use by drives\[0\] too/,
    );
    expect(problem(() => openDrives([source(path), source(other, { overlay: path })]))).toMatch(
      /in use by drives\[0\]/,
    );
    expect(problem(() => openDrive(path, { overlay: path }))).toMatch(
      /^drives\[0\] has .* as file and as overlay; give/,
    );
  });

  test('may share what none of them writes', () => {
    const path = image();
    const all = [
      source(path, { readOnly: true }),
      source(path, { readOnly: true }),
      source(path, { overlay: `${path}.1` }),
      source(path, { overlay: `${path}.2` }),
    ];
    const before = descriptors();
    const disks = openDrives(all);
    expect(disks.map(({ readOnly }) => readOnly)).toEqual([true, true, false, false]);
    for (const disk of disks) disk.close();
    expect(descriptors()).toBe(before);
  });
});

describe('another machine', () => {
  const modes = { writer: {}, reader: { readOnly: true } } as const;

  /** Another process that has the image open as a drive. */
  async function elsewhere(path: string, options: Parameters<typeof source>[1], then: () => void): Promise<void> {
    const script = `
      import { openDrives } from ${JSON.stringify(join(process.cwd(), 'dist/backends/disk/open-drives.js'))};
      openDrives([${JSON.stringify({ ...source(path, options), overlay: options?.overlay })}]);
      console.log('open');
      process.stdin.resume();`;
    const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    await once(child.stdout, 'data');
    const exited = once(child, 'exit');
    try {
      then();
    } finally {
      child.kill('SIGKILL');
      await exited;
    }
  }

  const inUse = (path: string) => problem(() => openDrive(path));
  const inUseToRead = (path: string) => problem(() => openDrive(path, { readOnly: true }));

  test('that writes an image has it alone, until it ends', async () => {
    const path = image();
    await elsewhere(path, modes.writer, () => {
      expect(inUse(path)).toBe(
        `${path}: in use by another machine; end that one, or use readonly on both, or an overlay each`,
      );
      expect(inUseToRead(path)).toBe(`${path}: in use by another machine that writes it; end that one first`);
      expect(problem(() => openDrive(path, { overlay: `${path}.o` }))).toMatch(/in use by another machine that writes/);
    });
    openDrive(path).close();
  });

  test('that reads it leaves it to readers', async () => {
    const path = image();
    await elsewhere(path, modes.reader, () => {
      expect(inUse(path)).toMatch(/in use by another machine/);
      openDrive(path, { readOnly: true }).close();
      openDrive(path, { overlay: `${path}.o` }).close();
    });
  });

  test('with an overlay has that alone, and its base with readers', async () => {
    const path = image();
    const overlay = `${path}.o`;
    await elsewhere(path, { overlay }, () => {
      expect(inUse(path)).toMatch(/in use by another machine/);
      expect(problem(() => openDrive(path, { overlay }))).toMatch(/\.o: in use by another machine; end that one/);
      openDrive(path, { overlay: `${path}.o2` }).close();
    });
    openDrive(path, { overlay }).close();
  });

  // QEMU's locks (its docs and block/file-posix.c): read locks on bytes from 100 on for what it does, and from 200 on for
  // what it lets nobody else do; 1 is writing, 3 resizing. Another open file is another owner, in this process too.
  function qemu<T>(path: string, bytes: number[], then: () => T): T {
    const fd = openSync(path, 'r');
    try {
      for (const byte of bytes) expect(addon.ofdLock(fd, false, false, byte, 1)).toBe(0);
      return then();
    } finally {
      closeSync(fd);
    }
  }

  test('may be a QEMU: one that writes is noticed, one that reads is a reader', () => {
    const path = image();
    qemu(path, [100, 101, 103, 201, 203], () => {
      expect(inUse(path)).toMatch(/in use by another machine/);
      expect(inUseToRead(path)).toMatch(/in use by another machine that writes it/);
    });
    qemu(path, [100, 201], () => {
      expect(inUse(path)).toMatch(/in use by another machine/);
      openDrive(path, { readOnly: true }).close();
    });
  });

  test('that is a QEMU notices us', () => {
    const path = image();
    // Does anybody write? Does anybody mind that QEMU does?
    const conflicts = () => {
      const fd = openSync(path, 'r');
      const results = [101, 201].map((byte) => addon.ofdLock(fd, true, true, byte, 1) !== 0);
      closeSync(fd);
      return results;
    };
    const writer = openDrive(path);
    expect(conflicts()).toEqual([true, true]);
    writer.close();
    const reader = openDrive(path, { readOnly: true });
    expect(conflicts()).toEqual([false, true]);
    reader.close();
    expect(conflicts()).toEqual([false, false]);
  });
});
