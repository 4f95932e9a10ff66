import { createHash } from 'node:crypto';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { AllocationBitmap } from '#dist/backends/disk/allocation-bitmap.js';
import { PENDING } from '#dist/backends/disk/disk.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { temporaryFolder } from '../../support/temporary-folder.js';
import { BlkRig, header, OK, openDrive, range, SECTOR } from '../../support/virtio/blk-rig.js';
import { DiskModel, expectBytes, noise, random, SEED } from '../../support/virtio/disk-model.js';

const MiB = 2 ** 20;
const CLUSTER = 4096;
const folder = temporaryFolder();
let count = 0;

const outHeader = (sector: number) => header(abi.VIRTIO_BLK_T_OUT, sector);
const flushHeader = () => header(abi.VIRTIO_BLK_T_FLUSH);

/** A base with contents, and a name for an overlay that is not there yet. */
function pair(size: number, seed = 1) {
  const bytes = noise(size, seed);
  const name = join(folder, String(count++));
  const base = `${name}.img`;
  writeFileSync(base, bytes);
  return { bytes, base, overlay: `${name}.overlay` };
}

function hash(path: string): string {
  return createHash('sha256').update(readFileSync(path)).digest('hex');
}

function open(
  { base, overlay }: { base: string; overlay: string },
  cache: 'writeback' | 'none' | 'unsafe' = 'writeback',
) {
  return openDrive(base, { overlay, cache });
}

describe('an overlay', () => {
  test.each([
    ['writeback', 3 * MiB + 5 * SECTOR, 80],
    ['none', 2 * MiB + 8 * SECTOR, 60],
    ['unsafe', 64 * 1024 + SECTOR, 60],
    ['writeback', SECTOR, 20],
  ] as const)(
    `with cache=%s above %i bytes holds what a random driver wrote, also when opened again (seed ${SEED})`,
    (cache, size, batches) => {
      const files = pair(size);
      const before = hash(files.base);
      const model = new DiskModel(Uint8Array.from(files.bytes), SEED);
      for (let boot = 0; boot < 3; boot++) {
        const rig = new BlkRig(open(files, cache), {}, 512 * MiB);
        expect(rig.disk.size).toBe(size);
        model.check(rig);
        model.run(rig, batches);
        model.check(rig);
        rig.close();
      }
      const rig = new BlkRig(open(files, cache));
      model.check(rig);
      rig.close();
      expect(hash(files.base)).toBe(before);
    },
  );

  test('outlives a power-on in the middle of writes: those that were completed are there', () => {
    const files = pair(8 * MiB);
    const disk = open(files);
    const first = new BlkRig(disk, {}, 64 * MiB);
    const data = noise(3 * SECTOR, 9);
    expect(first.write(1, data)).toBe(OK);
    for (let i = 0; i < 32; i++) first.queue.add([outHeader(16 + 8 * i), noise(SECTOR, i), 1]);
    first.queue.notify();
    first.queue.send([flushHeader(), 1]);
    first.powerOff();
    const second = new BlkRig(disk);
    expectBytes(second.read(1, data.length).data, data);
    expect(second.write(16, data)).toBe(OK);
    expect(second.flush()).toBe(OK);
    second.close();
    const third = new BlkRig(open(files));
    expectBytes(third.read(1, data.length).data, data);
    expectBytes(third.read(16, data.length).data, data);
    expectBytes(third.read(0, SECTOR).data, files.bytes.subarray(0, SECTOR));
    third.close();
  });

  test('shares its base with others', () => {
    const one = pair(MiB);
    const two = { ...one, overlay: `${one.overlay}2` };
    const rigs = [one, two].map((files) => new BlkRig(open(files)));
    const [first, second] = rigs as [BlkRig, BlkRig];
    expect(first.write(0, noise(4096, 5))).toBe(OK);
    expectBytes(second.read(0, 4096).data, one.bytes.subarray(0, 4096));
    for (const rig of rigs) rig.close();
  });

  test('takes no more of the host than was written, and gives back what is discarded', () => {
    const files = pair(8 * MiB);
    const rig = new BlkRig(open(files));
    const blocks = () => statSync(files.overlay).blocks;
    const empty = blocks();
    expect(empty).toBeLessThanOrEqual(32);
    rig.write(0, new Uint8Array(MiB).fill(1));
    rig.flush();
    const full = blocks();
    expect(full - empty).toBeGreaterThanOrEqual(MiB / 512);
    expect(full - empty).toBeLessThan(MiB / 512 + 64);
    expect(rig.discard(range(0, 2048))).toBe(OK);
    expect(blocks()).toBeLessThan(empty + 64);
    // What was the base's before is not the base's again.
    expect(rig.read(0, MiB).data.every((byte) => byte === 0)).toBe(true);
    rig.close();
  });

  test('a discard leaves the parts of clusters around it alone, and what was never written', () => {
    const files = pair(64 * 1024);
    const rig = new BlkRig(open(files));
    const data = noise(3 * CLUSTER, 3);
    rig.write(8, data);
    expect(rig.discard(range(9, 22))).toBe(OK);
    const after = rig.read(0, 64 * 1024).data;
    expectBytes(after.subarray(CLUSTER, CLUSTER + SECTOR), data.subarray(0, SECTOR));
    expectBytes(after.subarray(4 * CLUSTER - SECTOR, 4 * CLUSTER), data.subarray(3 * CLUSTER - SECTOR));
    expectBytes(after.subarray(4 * CLUSTER), files.bytes.subarray(4 * CLUSTER));
    expectBytes(after.subarray(0, CLUSTER), files.bytes.subarray(0, CLUSTER));
    rig.close();
  });

  test('zeros hide the base, also where they end within a cluster', () => {
    for (const flags of [0, 1]) {
      const files = pair(64 * 1024);
      for (const closed of [false, true]) {
        const rig = new BlkRig(open(files));
        if (!closed) expect(rig.zero(range(5, 30, flags))).toBe(OK);
        const expected = Uint8Array.from(files.bytes).fill(0, 5 * SECTOR, 35 * SECTOR);
        expectBytes(rig.read(0, 64 * 1024).data, expected);
        rig.close();
      }
    }
  });

  test('partial writes to one cluster at the same time do not lose each other', () => {
    const files = pair(MiB);
    const rig = new BlkRig(open(files));
    const expected = Uint8Array.from(files.bytes);
    const requests = [];
    // Every other sector of 16 clusters, the first of each cluster last.
    for (const sector of [6, 4, 2, 0]) {
      for (let cluster = 0; cluster < 16; cluster++) {
        const data = noise(SECTOR, 100 * cluster + sector);
        const at = cluster * 8 + sector;
        expected.set(data, at * SECTOR);
        requests.push([outHeader(at), data, 1]);
      }
    }
    rig.requests(requests);
    expectBytes(rig.read(0, MiB).data, expected);
    rig.close();
  });
});

describe('what of an overlay is durable', () => {
  test('after a flush: everything completed before; what came later is the base’s', () => {
    const files = pair(MiB);
    const rig = new BlkRig(open(files));
    const [early, late] = [noise(5 * SECTOR, 2), noise(5 * SECTOR, 3)];
    rig.write(3, early);
    expect(rig.flush()).toBe(OK);
    rig.write(1003, late);
    // As after a crash of tsvisor: nothing was closed.
    const crashed = { base: files.base, overlay: `${files.overlay}.crashed` };
    copyFileSync(files.overlay, crashed.overlay);
    const after = new BlkRig(open(crashed));
    const expected = Uint8Array.from(files.bytes);
    expected.set(early, 3 * SECTOR);
    expectBytes(after.read(0, MiB).data, expected);
    after.close();
    rig.close();
    const closed = new BlkRig(open(files));
    expected.set(late, 1003 * SECTOR);
    expectBytes(closed.read(0, MiB).data, expected);
    closed.close();
  });

  test.each(['writeback', 'none', 'unsafe'] as const)(
    'with cache=%s nothing waits when its I/O has come to rest',
    (cache) => {
      const rig = new BlkRig(open(pair(MiB), cache));
      // Writes that make the same clusters the overlay's wait for each other; flushes for the round before.
      const requests = Array.from({ length: 24 }, (_, n) =>
        n % 6 === 5 ? [flushHeader(), 1] : [outHeader(n % 4), noise((1 + (n % 3)) * SECTOR, n), 1],
      );
      for (const request of requests) rig.queue.add(request);
      rig.queue.notify();
      expect(rig.io.pending).toBeGreaterThan(0);
      let done = -1;
      rig.io.whenIdle(() => {
        done = rig.queue.completions().length;
      });
      rig.pump();
      expect(done).toBe(requests.length);
      rig.close();
    },
  );

  test('with cache=unsafe all is after sync(), as a snapshot needs it', () => {
    const files = pair(MiB);
    const rig = new BlkRig(open(files, 'unsafe'));
    expect(rig.write(8, noise(CLUSTER, 7))).toBe(OK);
    let result: number | undefined;
    expect(rig.disk.sync({ ioDone: (outcome) => (result = outcome) })).toBe(PENDING);
    rig.pump();
    expect(result).toBe(0);
    const copy = `${files.overlay}.copy`;
    copyFileSync(files.overlay, copy);
    const other = new BlkRig(open({ base: files.base, overlay: copy }));
    expectBytes(other.read(8, CLUSTER).data, noise(CLUSTER, 7));
    other.close();
    rig.close();
  });

  test('with cache=unsafe nothing is until it is closed', () => {
    const files = pair(MiB);
    const rig = new BlkRig(open(files, 'unsafe'));
    const data = noise(SECTOR, 2);
    rig.write(0, data);
    expect(rig.flush()).toBe(OK);
    const crashed = { base: files.base, overlay: `${files.overlay}.crashed` };
    copyFileSync(files.overlay, crashed.overlay);
    const after = new BlkRig(open(crashed));
    expectBytes(after.read(0, SECTOR).data, files.bytes.subarray(0, SECTOR));
    after.close();
    rig.close();
    const closed = new BlkRig(open(files));
    expectBytes(closed.read(0, SECTOR).data, data);
    closed.close();
  });
});

describe('an overlay file', () => {
  test('appears complete, and alone', () => {
    const files = pair(MiB + SECTOR);
    open(files).close();
    expect(readdirSync(folder).filter((name) => name.startsWith(`${count - 1}.`))).toHaveLength(2);
    expect(statSync(files.overlay).size).toBe(2 * CLUSTER + MiB + SECTOR);
  });

  test('that cannot be made says why', () => {
    const files = pair(SECTOR);
    const overlay = join(folder, 'missing', 'x.overlay');
    expect(() => open({ ...files, overlay })).toThrow(
      /x\.overlay: the overlay cannot be made: ENOENT; make its folder/,
    );
    expect(existsSync(overlay)).toBe(false);
    openDrive(files.base).close(); // the base is free again
  });

  /** An overlay with something in it, changed by the test; then opened. */
  function changed(change: (path: string, bytes: Buffer) => void, files = pair(MiB)) {
    const rig = new BlkRig(open(files));
    rig.write(0, noise(4096, 4));
    rig.close();
    change(files.overlay, readFileSync(files.overlay));
    return () => open(files);
  }

  test.each([0, 8, 12, 16, 24, 32, 40, 4063, 4064, 4095])('with another byte %i in its header is refused', (at) => {
    const opening = changed((path, bytes) => {
      bytes[at] = (bytes[at] as number) ^ 1;
      writeFileSync(path, bytes);
    });
    expect(opening).toThrow(at === 0 ? /not an overlay of tsvisor/ : /a damaged overlay: the checksum of its header/);
  });

  test.each([0, 1, 100, 4095, 4096, 8191, 8192, 2 * 4096 + MiB - 1])('cut off at %i bytes is refused', (size) => {
    expect(changed((path) => truncateSync(path, size))).toThrow(
      size < 4096 ? /not an overlay/ : new RegExp(`a damaged overlay: it has ${size} bytes instead of`),
    );
  });

  test('that is longer than it should be, or has clusters that its base has not, is refused', () => {
    expect(changed((path) => truncateSync(path, 2 * 4096 + MiB + 1))).toThrow(/damaged overlay: it has/);
    for (const [size, at, bit] of [
      [MiB, 4096 + 32, 1],
      [MiB, 8191, 0x80],
      [MiB + SECTOR, 4096 + 32, 2],
    ] as const) {
      const opening = changed((path, bytes) => {
        bytes[at] = (bytes[at] as number) | bit;
        writeFileSync(path, bytes);
      }, pair(size));
      expect(opening).toThrow(/damaged overlay: its bitmap/);
    }
  });

  test('of another version is refused with both numbers', () => {
    const opening = changed((path, bytes) => {
      bytes.writeUInt32LE(2, 8);
      createHash('sha256').update(bytes.subarray(0, 4064)).digest().copy(bytes, 4064);
      writeFileSync(path, bytes);
    });
    expect(opening).toThrow(/an overlay of version 2; this tsvisor knows version 1/);
  });

  test('for a base of another size, or that has changed since, is refused', () => {
    const files = pair(MiB);
    open(files).close();
    const other = pair(2 * MiB);
    expect(() => open({ base: other.base, overlay: files.overlay })).toThrow(
      `${files.overlay}: an overlay for ${files.base} of ${MiB} bytes; ${other.base} has ${2 * MiB}; give it the base`,
    );
    const twin = pair(MiB);
    expect(() => open({ base: twin.base, overlay: files.overlay })).toThrow(
      /is not, or is no longer, what this overlay/,
    );
    const { atime, mtime } = statSync(files.base);
    utimesSync(files.base, atime, new Date(mtime.getTime() + 1));
    expect(() => open(files)).toThrow(/is not, or is no longer/);
  });

  test('whose header claims a long or strange path only has that shown', () => {
    const strange = join(folder, `a\x1b[31m\n${'x'.repeat(200)}`);
    writeFileSync(strange, new Uint8Array(MiB));
    const overlay = join(folder, 'strange.overlay');
    openDrive(strange, { overlay }).close();
    const bytes = readFileSync(overlay);
    bytes.writeUInt32LE(0xffff_ffff, 32);
    createHash('sha256').update(bytes.subarray(0, 4064)).digest().copy(bytes, 4064);
    writeFileSync(overlay, bytes);
    const other = pair(2 * MiB);
    let message = '';
    try {
      openDrive(other.base, { overlay });
    } catch (error) {
      message = (error as Error).message;
    }
    expect(message).toMatch(/an overlay for .*a\?\[31m\?x+/);
    expect(message).not.toMatch(/\p{C}/u);
  });

  test.each([
    ['a directory', (path: string) => mkdirSync(path)],
    ['another image', (path: string) => writeFileSync(path, new Uint8Array(MiB))],
    ['an empty file', (path: string) => writeFileSync(path, '')],
  ])('that is %s is refused, and left as it is', (_, make) => {
    const files = pair(MiB);
    make(files.overlay);
    expect(() => open(files)).toThrow(expect.objectContaining({ code: 'ERR_DRIVE' }));
    openDrive(files.base).close();
  });

  test(`of noise with a good header never does worse than give noise (seed ${SEED})`, () => {
    const next = random(SEED);
    for (let i = 0; i < 20; i++) {
      const files = pair(64 * 1024);
      const opening = changed((path, bytes) => {
        for (let n = 0; n < 4; n++) bytes[4096 + Math.floor(next() * 2)] = Math.floor(next() * 256);
        writeFileSync(path, bytes);
      }, files);
      const rig = new BlkRig(opening());
      expect(rig.read(0, 64 * 1024).status).toBe(OK);
      rig.close();
    }
  });
});

describe('the allocation bitmap', () => {
  test(`finds what a plain array finds (seed ${SEED})`, () => {
    const next = random(SEED);
    const size = 4096 * 8 * 3 + 77;
    const bitmap = new AllocationBitmap(new Uint8Array(4096 * 4), size);
    const plain = new Uint8Array(size);
    for (let i = 0; i < 300; i++) {
      const first = Math.floor(next() * size);
      const last = Math.min(size - 1, first + Math.floor(next() * next() * 2000));
      bitmap.set(first, last);
      plain.fill(1, first, last + 1);
      const from = Math.floor(next() * size);
      const end = Math.min(size, from + 1 + Math.floor(next() * 10000));
      for (const value of [true, false]) {
        const found = plain.subarray(from, end).indexOf(value ? 1 : 0);
        expect(bitmap.find(value, from, end)).toBe(found < 0 ? end : from + found);
      }
    }
    expect(bitmap.overflows).toBe(false);
  });

  test('gives what is dirty once, in pieces, and again when it was not written', () => {
    const bytes = new Uint8Array(4096 * 40);
    const bitmap = new AllocationBitmap(bytes, 4096 * 40 * 8);
    bitmap.set(0, 4096 * 8 * 20 - 1);
    bitmap.set(4096 * 8 * 30, 4096 * 8 * 30);
    const pieces = bitmap.takeDirty();
    expect(pieces.map(({ offset, bytes }) => [offset / 4096, bytes.length / 4096])).toEqual([
      [0, 16],
      [16, 4],
      [30, 1],
    ]);
    expect(bitmap.takeDirty()).toEqual([]);
    bitmap.set(4096 * 8 * 30 + 1, 4096 * 8 * 30 + 1);
    expect(pieces[2]?.bytes[0]).toBe(1); // a copy
    bitmap.markDirty(pieces.slice(1, 2));
    expect(bitmap.takeDirty().map(({ offset }) => offset / 4096)).toEqual([16, 30]);
    bitmap.set(5, 9); // set already
    expect(bitmap.takeDirty()).toEqual([]);
  });
});
