import { constants } from 'node:os';
import { describe, expect, test } from 'vitest';
import { AllocationBitmap } from '#dist/backends/disk/allocation-bitmap.js';
import { PENDING } from '#dist/backends/disk/disk.js';
import type { ImageFile } from '#dist/backends/disk/image-file.js';
import { OverlayImage } from '#dist/backends/disk/overlay-image.js';
import type { GuestIo } from '#dist/backends/guest-io.js';
import { Segments } from '#dist/virtio/segments.js';
import { FakeIo } from '../../support/virtio/fake-io.js';
import { mockMemory } from '../../support/virtio/mock-driver.js';

const { ECANCELED, EIO, ENOSPC } = constants.errno;
const BASE = 5;
const FILE = 6;
const DATA = 8192;
const CLUSTER = 4096;
const SECTOR = 512;
const SIZE = 16 * CLUSTER - 3 * SECTOR;

/** An overlay whose files do what the test says. */
function rig() {
  const { memory } = mockMemory(1 << 20);
  const io = new FakeIo(BASE);
  const bitmap = new AllocationBitmap(new Uint8Array(4096), 16);
  const base = { fd: BASE, directFd: -1, size: SIZE, blockSize: 512, physicalBlockSize: 512 } as ImageFile;
  const overlay = { fd: FILE, directFd: -1, bitmap, bitmapOffset: 4096, dataOffset: DATA };
  const disk = new OverlayImage('test.overlay', base, overlay, false);
  disk.attach(io as unknown as GuestIo, memory);
  io.transfer = () => -constants.errno.EAGAIN;
  const results: [name: string, result: number][] = [];
  const segments = (length: number) => {
    const all = new Segments(memory);
    all.add(0, length);
    return all;
  };
  const named = (name: string) => ({ ioDone: (result: number) => results.push([name, result]) });
  const write = (name: string, sector: number, count: number) =>
    disk.write(sector * SECTOR, segments(count * SECTOR), named(name));
  const zero = (name: string, sector: number, count: number) =>
    disk.zero(sector * SECTOR, count * SECTOR, false, named(name));
  const discard = (name: string, sector: number, count: number) =>
    disk.discard(sector * SECTOR, count * SECTOR, named(name));
  const read = (name: string, sector: number, count: number) =>
    disk.read(sector * SECTOR, segments(count * SECTOR), named(name));
  /** All that is submitted until nothing more comes. */
  const finish = () => {
    const order: string[] = [];
    while (io.list.length > 0) {
      order.push(io.list[0] as string);
      io.end();
    }
    return order;
  };
  return { io, bitmap, disk, results, write, zero, discard, read, finish };
}

/** An operation on the overlay's file as FakeIo lists it. */
function at(what: string, sector: number, count: number, fd = FILE): string {
  return `${what} ${fd}@${(fd === FILE ? DATA : 0) + sector * SECTOR}+${count * SECTOR}`;
}

describe('a write of an overlay', () => {
  test('completes its first and its last cluster from the base; then they are the overlay’s', () => {
    const { bitmap, write, finish, results } = rig();
    expect(write('w', 3, 15)).toBe(PENDING);
    expect(bitmap.has(0)).toBe(false);
    expect(finish()).toEqual([at('copy', 0, 3), at('copy', 18, 6), at('write', 3, 15)]);
    expect(results).toEqual([['w', 0]]);
    expect([0, 1, 2, 3].map((cluster) => bitmap.has(cluster))).toEqual([true, true, true, false]);
    write('again', 3, 15);
    expect(finish()).toEqual([at('write', 3, 15)]);
  });

  test('of whole clusters copies nothing, nor does the last of the disk need what it has not', () => {
    const { write, finish } = rig();
    write('whole', 8, 16);
    expect(finish()).toEqual([at('write', 8, 16)]);
    write('last', 120, 5);
    expect(finish()).toEqual([at('write', 120, 5)]);
  });

  test('waits for another that makes one of its clusters the overlay’s, and then copies nothing of that', () => {
    const { io, write, zero, finish, results } = rig();
    write('first', 1, 1);
    write('same cluster', 2, 1);
    zero('same too', 4, 1);
    write('from the cluster on', 7, 9);
    expect(io.list).toEqual([at('copy', 0, 1)]);
    const order = finish();
    expect(order.slice(0, 3)).toEqual([at('copy', 0, 1), at('copy', 2, 6), at('write', 1, 1)]);
    expect(order.slice(3).sort()).toEqual([at('write', 2, 1), at('zeroRange', 4, 1), at('write', 7, 9)].sort());
    expect(results.map(([, result]) => result)).toEqual([0, 0, 0, 0]);
  });

  test.each([
    [0, 9, 15, 1],
    [15, 1, 0, 9],
    [8, 8, 7, 10],
    [7, 10, 8, 8],
  ])('of sectors %i+%i has the same clusters as %i+%i', (first, count, second, secondCount) => {
    const { io, write, finish, results } = rig();
    write('first', first, count);
    const before = io.list.length;
    write('second', second, secondCount);
    expect(io.list).toHaveLength(before);
    finish();
    expect(results).toHaveLength(2);
  });

  test('does not wait for one of other clusters', () => {
    const { io, write } = rig();
    write('first', 1, 1);
    write('next', 9, 1);
    write('far', 33, 1);
    expect(io.list).toEqual([at('copy', 0, 1), at('copy', 8, 1), at('copy', 32, 1)]);
  });

  test.each([0, 1, 2])('that fails at step %i leaves its clusters the base’s, and to the next', (step) => {
    const { io, bitmap, write, finish, results } = rig();
    write('first', 1, 1);
    write('second', 2, 1);
    for (let i = 0; i < step; i++) io.end();
    io.end(-ENOSPC);
    expect(results).toEqual([['first', -ENOSPC]]);
    expect(bitmap.has(0)).toBe(false);
    expect(finish()).toEqual([at('copy', 0, 2), at('copy', 3, 5), at('write', 2, 1)]);
    expect(bitmap.has(0)).toBe(true);
  });

  test('fails where the base is shorter than it was', () => {
    const { io, write, results } = rig();
    write('w', 1, 1);
    io.end(100);
    expect(results).toEqual([['w', -EIO]]);
  });
});

describe('a read of an overlay', () => {
  test('takes each cluster from where it is', () => {
    const { bitmap, read, finish, results } = rig();
    bitmap.set(1, 2);
    bitmap.set(4, 4);
    read('r', 4, 40);
    expect(finish()).toEqual([
      at('read', 4, 4, BASE),
      at('read', 8, 16),
      at('read', 24, 8, BASE),
      at('read', 32, 8),
      at('read', 40, 4, BASE),
    ]);
    expect(results).toEqual([['r', 0]]);
  });
});

describe('a discard of an overlay', () => {
  test('is for whole clusters that are the overlay’s', () => {
    const { bitmap, discard, finish, results } = rig();
    bitmap.set(0, 2);
    bitmap.set(4, 5);
    expect(discard('d', 1, 46)).toBe(PENDING);
    expect(finish()).toEqual([at('punchHole', 8, 16), at('punchHole', 32, 8)]);
    expect(results).toEqual([['d', 0]]);
    expect(discard('base', 64, 16)).toBe(0);
    expect(discard('within', 9, 6)).toBe(0);
  });
});

describe('what is cancelled', () => {
  test('takes no further step, and what waits never begins', () => {
    const { io, bitmap, disk, write, read, finish, results } = rig();
    bitmap.set(8, 8);
    write('begun', 1, 1);
    write('waits', 2, 1);
    read('reads', 60, 12);
    io.cancel = () => {};
    disk.cancel();
    expect(results).toEqual([['waits', -ECANCELED]]);
    expect(finish()).toEqual([at('copy', 0, 1), at('read', 60, 4, BASE)]);
    expect(results.slice(1)).toEqual([
      ['begun', -ECANCELED],
      ['reads', -ECANCELED],
    ]);
    expect(bitmap.has(0)).toBe(false);
    write('new', 1, 1);
    expect(finish()).toHaveLength(3);
    expect(results.at(-1)).toEqual(['new', 0]);
  });
});
