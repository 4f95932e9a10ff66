import { execFileSync, spawnSync } from 'node:child_process';
import {
  closeSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import * as abi from '#dist/virtio/generated/virtio.js';
import { temporaryFolder } from '../../support/temporary-folder.js';
import { BlkRig, header, IOERR, OK, openDrive, range, SECTOR, statusOf, UNSUPP } from '../../support/virtio/blk-rig.js';
import { DiskModel, expectBytes, noise, random, SEED } from '../../support/virtio/disk-model.js';

const MiB = 2 ** 20;
const folder = temporaryFolder();
let images = 0;

function image(size: number, contents?: Uint8Array): string {
  const path = join(folder, `${images++}.img`);
  writeFileSync(path, contents ?? new Uint8Array());
  truncateSync(path, size);
  return path;
}

function writeAt(path: string, offset: number, bytes: Uint8Array): void {
  const fd = openSync(path, 'r+');
  writeSync(fd, bytes, 0, bytes.length, offset);
  closeSync(fd);
}

describe.each(['writeback', 'none', 'unsafe'] as const)('a raw image with cache=%s', (cache) => {
  test(`holds what a random driver wrote (seed ${SEED})`, () => {
    const size = 2 * MiB + 5 * SECTOR;
    const bytes = noise(size);
    const path = image(size, bytes);
    const rig = new BlkRig(openDrive(path, { cache }), {}, 512 * MiB);
    const model = new DiskModel(bytes, SEED);
    model.run(rig, 100);
    model.check(rig);
    expect(rig.flush()).toBe(OK);
    rig.close();
    expect(statSync(path).size).toBe(size);
    const again = new BlkRig(openDrive(path, { cache, readOnly: true }));
    model.check(again);
    again.close();
  });

  test('takes buffers at any address', () => {
    const path = image(MiB);
    const rig = new BlkRig(openDrive(path, { cache }));
    const data = noise(8192, 2);
    const pieces = [data.subarray(0, 3), data.subarray(3, 4100), data.subarray(4100)];
    expect(statusOf(rig.request(header(abi.VIRTIO_BLK_T_OUT, 1), ...pieces, 1))).toBe(OK);
    const done = rig.request(header(abi.VIRTIO_BLK_T_IN, 1), 1, 4096, 4095, 1);
    expect(done.data.subarray(0, 8192)).toEqual(data);
    rig.close();
    expect(new Uint8Array(readFileSync(path).subarray(SECTOR, SECTOR + 8192))).toEqual(data);
  });
});

describe('a raw image', () => {
  test('moves requests of many megabytes, in pieces', () => {
    const path = image(24 * MiB);
    const rig = new BlkRig(openDrive(path), {}, 64 * MiB);
    const data = noise(11 * MiB + SECTOR, 3);
    expect(rig.write(7, data)).toBe(OK);
    const back = rig.read(7, data.length);
    expect(back).toMatchObject({ status: OK, written: data.length + 1 });
    expectBytes(back.data, data);
    rig.close();
  });

  test('gives blocks back to the host when they are discarded, or zeroed with unmap; not otherwise', () => {
    const path = image(4 * MiB);
    const rig = new BlkRig(openDrive(path));
    const blocks = () => statSync(path).blocks;
    expect(rig.write(0, noise(2 * MiB, 4))).toBe(OK);
    rig.flush();
    const full = blocks();
    expect(full).toBeGreaterThanOrEqual((2 * MiB) / 512);
    expect(rig.zero(range(0, 1024))).toBe(OK);
    expect(blocks()).toBe(full);
    expect(rig.zero(range(0, 1024, 1))).toBe(OK);
    expect(blocks()).toBe(full - 1024);
    expect(rig.discard(range(1024, 1024), range(2048, 512))).toBe(OK);
    expect(blocks()).toBe(full - 2560);
    expect(rig.read(0, 1024 * SECTOR).data.every((byte) => byte === 0)).toBe(true);
    expect(statSync(path).size).toBe(4 * MiB);
    rig.close();
  });

  test('that somebody makes shorter fails reads past its end, and nothing else', () => {
    const path = image(MiB);
    const rig = new BlkRig(openDrive(path));
    truncateSync(path, MiB / 2);
    expect(rig.read(0, 4096).status).toBe(OK);
    expect(rig.read(MiB / 2 / SECTOR, 4096).status).toBe(IOERR);
    expect(rig.read(MiB / 2 / SECTOR - 1, 4096).status).toBe(IOERR);
    expect(rig.warnings).toHaveLength(2);
    expect(rig.read(0, 4096).status).toBe(OK);
    rig.close();
  });

  test('read-only is never written', () => {
    const bytes = noise(MiB);
    const path = image(MiB, bytes);
    const rig = new BlkRig(openDrive(path, { readOnly: true }));
    expect(rig.write(0, new Uint8Array(512))).toBe(IOERR);
    expect(rig.read(0, 512)).toMatchObject({ status: OK, data: bytes.subarray(0, 512) });
    expect(rig.flush()).toBe(OK);
    rig.close();
    expectBytes(readFileSync(path), bytes);
  });

  test('outlives a power-on: what was under way is forgotten, what was written is there', () => {
    const path = image(8 * MiB);
    const disk = openDrive(path);
    const first = new BlkRig(disk, {}, 64 * MiB);
    const data = noise(4096, 5);
    expect(first.write(0, data)).toBe(OK);
    for (let i = 0; i < 32; i++)
      first.queue.add([header(abi.VIRTIO_BLK_T_OUT, 8 + 256 * i), new Uint8Array(256 * SECTOR), 1]);
    first.queue.notify();
    first.powerOff();
    const second = new BlkRig(disk);
    expectBytes(second.read(0, 4096).data, data);
    expect(second.write(8, data)).toBe(OK);
    expectBytes(second.read(8, 4096).data, data);
    second.close();
  });

  test('a reset in the middle of I/O: guest memory is left alone once the vCPUs may run', () => {
    const requests = 64;
    const length = 4 * MiB;
    const path = image(requests * length);
    for (let i = 0; i < requests; i++) writeAt(path, i * length, noise(4096, i));
    const rig = new BlkRig(openDrive(path, { cache: 'none' }), {}, 512 * MiB);
    const { memory } = rig.driver;
    const { queue } = rig;
    const heads = Array.from({ length: requests }, (_, i) =>
      queue.add([header(abi.VIRTIO_BLK_T_IN, i * (length / SECTOR)), length, 1]),
    );
    const buffers = heads.map((head) => memory.readU32(queue.descriptors + 16 * ((head + 1) % 256)));
    queue.notify();
    expect(rig.io.pending).toBe(requests);
    rig.driver.status = 0;
    expect(rig.holds).toBe(1);
    while (rig.holds > 0) rig.pumpOnce();
    expect(rig.io.pending).toBe(0);
    // 256 MiB were asked for; most were still waiting for a thread and never began.
    const start = (gpa: number) => memory.slice(gpa, 4096);
    expect(buffers.filter((gpa) => start(gpa).every((byte) => byte === 0)).length).toBeGreaterThan(0);
    expect(queue.usedIndex).toBe(0);
    // The guest uses that memory for something else, and the device again.
    for (const gpa of buffers) start(gpa).fill(0x5a);
    rig.driver.initialize();
    expect(rig.read(0, 4096)).toMatchObject({ status: OK, data: noise(4096, 0) });
    for (const gpa of buffers) expect(start(gpa).every((byte) => byte === 0x5a)).toBe(true);
    rig.close();
  });
});

/**
 * Where a file cannot grow beyond a megabyte: a full file system; for a user who may not mount one, a limit of this process,
 * which is as real to the drive.
 */
function smallHost(): { folder: string; error: string; limit: (on: boolean) => void } {
  const mount = join(folder, 'small');
  mkdirSync(mount);
  if (spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'none', mount]).status === 0) {
    // Reached through a descriptor alone: it is gone with this process, however that ends.
    const fd = openSync(mount, 'r');
    execFileSync('umount', ['--lazy', mount]);
    return { folder: `/proc/self/fd/${fd}`, error: 'ENOSPC', limit: () => {} };
  }
  process.on('SIGXFSZ', () => {});
  const limit = (on: boolean) => {
    execFileSync('prlimit', [`--pid=${process.pid}`, `--fsize=${on ? MiB : 'unlimited'}:unlimited`]);
  };
  return { folder: mount, error: 'EFBIG', limit };
}

describe('a host with no space left', () => {
  const { folder: small, error, limit } = smallHost();

  test.each([false, true])('fails the write (overlay %s), says so, and the drive goes on', (withOverlay) => {
    const path = join(small, 'x.img');
    const base = image(8 * MiB, noise(64 * 1024));
    if (!withOverlay) writeFileSync(path, '');
    if (!withOverlay) truncateSync(path, 8 * MiB);
    const disk = withOverlay ? openDrive(base, { overlay: path }) : openDrive(path);
    const rig = new BlkRig(disk);
    const data = noise(256 * 1024, 7);
    limit(true);
    try {
      const statuses = Array.from({ length: 8 }, (_, i) => rig.write(i * 512, data));
      expect(statuses.slice(0, 3)).toEqual([OK, OK, OK]);
      expect(statuses.slice(4)).toEqual([IOERR, IOERR, IOERR, IOERR]);
      expect(rig.warnings[0]).toMatch(/^blk0 \(.*x\.img\): writing 262144 bytes at \d+ failed with /);
      expect(rig.warnings[0]?.endsWith(error)).toBe(true);
      expectBytes(rig.read(0, data.length).data, data);
      expect(rig.discard(range(512, 512))).toBe(OK);
      expect(rig.write(512, data)).toBe(OK);
      expectBytes(rig.read(512, data.length).data, data);
      rig.close();
    } finally {
      limit(false);
    }
    rmSync(path);
  });
});

// Loop devices are root's.
describe.runIf(process.getuid?.() === 0)('a block device', () => {
  function loopDevice(use: (path: string) => void, ...options: string[]): void {
    const backing = image(4 * MiB);
    const device = execFileSync('losetup', ['--find', '--show', ...options, backing], { encoding: 'utf8' }).trim();
    try {
      use(device);
    } finally {
      execFileSync('losetup', ['--detach', device]);
    }
  }

  test.each(['writeback', 'none'] as const)('is a drive like any other (cache=%s)', (cache) => {
    loopDevice((device) => {
      const rig = new BlkRig(openDrive(device, { cache }), {}, 256 * MiB);
      expect(rig.disk).toMatchObject({ size: 4 * MiB, blockSize: 512 });
      const model = new DiskModel(new Uint8Array(4 * MiB), SEED);
      model.run(rig, 30);
      model.check(rig);
      expect(rig.flush()).toBe(OK);
      expect(() => openDrive(device)).toThrow(/in use by another machine/);
      rig.close();
      // Under an overlay it is only read.
      const overlay = `${join(folder, 'device')}.${cache}.overlay`;
      for (let boot = 0; boot < 2; boot++) {
        const above = new BlkRig(openDrive(device, { cache, overlay }), {}, 256 * MiB);
        model.check(above);
        if (boot === 0) model.run(above, 10);
        above.close();
      }
    });
  });

  test('with blocks of 4096 bytes says so, and takes sectors all the same', () => {
    loopDevice((device) => {
      const rig = new BlkRig(openDrive(device, { cache: 'none' }));
      const blockSize = rig.driver.readConfig(abi.virtio_blk_config.blk_size, 4);
      expect(new DataView(blockSize.buffer).getUint32(0, true)).toBe(4096);
      const data = noise(3 * SECTOR, 8);
      expect(rig.write(1, data)).toBe(OK);
      expectBytes(rig.read(1, data.length).data, data);
      expectBytes(rig.read(0, 4096).data.subarray(SECTOR, 4 * SECTOR), data);
      expect(rig.warnings).toEqual([]);
      rig.close();
    }, '--sector-size=4096');
  });
});

test(`a driver that sends anything gets a status for all of it (seed ${SEED})`, () => {
  const next = random(SEED);
  const below = (limit: number) => Math.floor(next() * limit);
  const pick = <T>(...choices: T[]) => choices[below(choices.length)] as T;
  const path = image(MiB);
  for (const overlay of [undefined, `${path}.overlay`]) {
    const rig = new BlkRig(openDrive(path, { overlay }), {}, 512 * MiB);
    for (let i = 0; i < 400; i++) {
      const requests = Array.from({ length: 1 + below(8) }, () => {
        const sector = pick<number | bigint>(below(2100), 2047, 2048, BigInt(below(2 ** 31)) << BigInt(below(64)));
        const first = header(pick(0, 1, 4, 8, 11, 13, below(2 ** 32)), BigInt.asUintN(64, BigInt(sector)));
        const rest = Array.from({ length: below(4) }, () =>
          pick(
            new Uint8Array(pick(512, 4096, below(600))),
            range(below(2100), pick(0, 8, below(2 ** 32)), pick(0, 0, 1, 2)),
          ),
        );
        const readable = pick(first, first, first, first.subarray(0, below(16)));
        return [readable, ...rest, ...Array.from({ length: below(3) }, () => pick(512, below(5000))), 1];
      });
      for (const done of rig.requests(requests)) {
        expect([OK, IOERR, UNSUPP]).toContain(statusOf(done));
        expect(done.written).toBeLessThanOrEqual(done.data.length);
      }
    }
    expect(rig.driver.broken).toEqual([]);
    expect(rig.warnings).toEqual([]);
    expect(rig.read(0, 512).status).toBe(OK);
    rig.close();
  }
});
