import { constants } from 'node:os';
import { describe, expect, test } from 'vitest';
import { AllocationBitmap } from '#dist/backends/disk/allocation-bitmap.js';
import { PENDING } from '#dist/backends/disk/disk.js';
import { HostFile } from '#dist/backends/disk/host-file.js';
import { OverlaySync } from '#dist/backends/disk/overlay-sync.js';
import type { GuestIo, IoRequest } from '#dist/backends/guest-io.js';
import { Segments } from '#dist/virtio/segments.js';
import { FakeIo, type Submitted } from '../../support/virtio/fake-io.js';
import { mockMemory } from '../../support/virtio/mock-driver.js';

const { EAGAIN, ECANCELED, EINVAL, EIO, EOPNOTSUPP } = constants.errno;
const MiB = 2 ** 20;
const FD = 7;
const DIRECT = 8;

function rig({ direct = false } = {}) {
  const { memory } = mockMemory(16 * MiB);
  const io = new FakeIo(FD);
  const file = new HostFile(FD, direct ? DIRECT : -1);
  file.attach(io as unknown as GuestIo, memory);
  const results: number[] = [];
  const request: IoRequest = { ioDone: (result) => results.push(result) };
  const segments = (...pairs: [gpa: number, length: number][]) => {
    const all = new Segments(memory);
    for (const [gpa, length] of pairs) all.add(gpa, length);
    return all;
  };
  return { io, file, results, request, segments };
}

describe('a page-cache read', () => {
  test('that hits is done at once', () => {
    const { io, file, results, request, segments } = rig();
    io.atOnce.push(4096);
    expect(file.read(512, segments([0, 4096]), request)).toBe(0);
    expect([io.list, results]).toEqual([[], []]);
  });

  test('that misses, or hits in part, has the rest from a thread', () => {
    const { io, file, results, request, segments } = rig();
    io.atOnce.push(-EAGAIN, 1024);
    expect(file.read(512, segments([0, 4096]), request)).toBe(PENDING);
    expect(file.read(512, segments([0, 4096]), request)).toBe(PENDING);
    expect(io.list).toEqual(['read 7@512+4096', 'read 7@1536+3072']);
    io.end();
    io.end(1024);
    expect(io.list).toEqual(['read 7@2560+2048']);
    io.end();
    expect(results).toEqual([0, 0]);
    expect(io.transfers).toEqual([512, 512]);
  });

  test('is not tried again at once where the file system cannot; writes are another matter', () => {
    const { io, file, request, segments } = rig();
    io.atOnce.push(-EOPNOTSUPP);
    for (let i = 0; i < 3; i++) file.read(0, segments([0, 512]), request);
    expect(io.transfers).toHaveLength(1);
    io.atOnce.push(512);
    expect(file.write(0, segments([0, 512]), request)).toBe(0);
  });

  test('that fails, fails; one past the end of the file too', () => {
    const { io, file, results, request, segments } = rig();
    io.atOnce.push(-EIO);
    expect(file.read(0, segments([0, 512]), request)).toBe(-EIO);
    file.read(0, segments([0, 512]), request);
    io.end(0);
    file.read(0, segments([0, 512]), request);
    io.end(-EIO);
    expect(results).toEqual([-EIO, -EIO]);
  });

  test('of much is a thread’s from the start, in pieces', () => {
    const { io, file, results, request, segments } = rig();
    file.read(0, segments([0, 3 * MiB], [3 * MiB, 6 * MiB]), request);
    expect(io.transfers).toEqual([]);
    const pieces: string[] = [];
    while (io.list.length > 0) {
      pieces.push(...io.list);
      io.end();
    }
    const at = [0, 4, 8].map((offset) => `read 7@${offset * MiB}+${Math.min(4, 9 - offset) * MiB}`);
    expect(pieces).toEqual(at);
    expect(results).toEqual([0]);
  });

  test('of nothing is done', () => {
    const { io, file, request, segments } = rig();
    expect(file.read(0, segments(), request)).toBe(0);
    expect(io.transfers).toEqual([]);
  });

  test('that is cancelled goes no further; those of other files do', () => {
    const { io, file, results, request, segments } = rig();
    const other = new HostFile(9);
    other.attach(io as unknown as GuestIo, mockMemory(MiB).memory);
    other.read(0, segments([0, MiB]), request);
    file.read(0, segments([0, 8 * MiB]), request);
    // One that a thread has begun ends as it would have, and no more of it follows.
    const begun = io.submitted.pop() as Submitted;
    io.cancel = (unwanted) => {
      expect(unwanted(begun.request)).toBe(true);
      expect(unwanted(io.submitted[0]?.request as IoRequest)).toBe(false);
    };
    file.cancel();
    begun.request.ioDone(4 * MiB);
    expect(results).toEqual([-ECANCELED]);
    expect(io.list).toEqual([`read 9@0+${MiB}`]);
  });
});

describe('cache=none', () => {
  test('goes past the page cache where offset, addresses and lengths allow it', () => {
    const { io, file, request, segments } = rig({ direct: true });
    file.write(512, segments([0, 512], [8192, 1024]), request);
    file.write(512, segments([0, 513], [8192, 511]), request);
    file.read(512, segments([8, 512]), request);
    expect(io.list).toEqual(['directWrite 8@512+1536', 'write 7@512+1024', 'read 7@512+512']);
    expect(io.transfers).toEqual([512, 512]); // O_DIRECT would wait for the disk
  });

  test('goes through it where the host wants more alignment, from then on without asking', () => {
    const { io, file, results, request, segments } = rig({ direct: true });
    file.read(512, segments([0, 512]), request);
    io.end(-EINVAL);
    expect(io.list).toEqual(['read 7@512+512']);
    io.end();
    file.read(512, segments([0, 512]), request);
    file.read(4096, segments([8192, 4096]), request);
    expect(io.list).toEqual(['read 7@512+512', 'read 8@4096+4096']);
    expect(results).toEqual([0]);
  });
});

describe('a flush that fails', () => {
  test('fails for good: what it should have written may be lost', () => {
    const { io, file, results, request } = rig();
    expect(file.flush(request)).toBe(PENDING);
    io.end(-EIO);
    expect(file.flush(request)).toBe(-EIO);
    expect(results).toEqual([-EIO]);
  });
});

describe('giving blocks back', () => {
  test('is not needed for a discard, and has a substitute for zeros', () => {
    const { io, file, results, request } = rig();
    file.discard(0, 4096, request);
    file.zero(4096, 4096, true, request);
    io.end(-EOPNOTSUPP);
    io.end(-EOPNOTSUPP);
    expect(io.list).toEqual(['zeroRange 7@4096+4096']);
    io.end();
    expect(results).toEqual([0, 0]);
    expect(file.discard(0, 4096, request)).toBe(0);
    file.zero(0, 4096, true, request);
    expect(io.list).toEqual(['zeroRange 7@0+4096']);
  });

  test('that fails otherwise, fails', () => {
    const { io, file, results, request } = rig();
    file.discard(0, 4096, request);
    io.end(-EIO);
    expect(results).toEqual([-EIO]);
  });
});

describe('a flush of an overlay', () => {
  const BITMAP = 4096;

  function overlay() {
    const { io, file, results, request } = rig();
    const bytes = new Uint8Array(4 * 4096);
    const bitmap = new AllocationBitmap(bytes, 4 * 4096 * 8);
    const sync = new OverlaySync(file, { fd: FD, directFd: -1, bitmap, bitmapOffset: BITMAP, dataOffset: 0 });
    return { io, bitmap, sync, results, request };
  }

  test('writes the bitmap between two syncs, and only what is new of it', () => {
    const { io, bitmap, sync, results, request } = overlay();
    bitmap.set(1, 3);
    bitmap.set(3 * 4096 * 8, 3 * 4096 * 8);
    sync.flush(request);
    const order: string[] = [];
    while (io.list.length > 0) {
      expect(io.list).toHaveLength(1);
      expect(results).toEqual([]);
      order.push(...io.list);
      io.end();
    }
    expect(order).toEqual([
      'flush 7@0+0',
      `bytes 7@${BITMAP}+4096`,
      `bytes 7@${BITMAP + 3 * 4096}+4096`,
      'flush 7@0+0',
    ]);
    sync.flush(request);
    io.end();
    expect(io.list).toEqual([]); // nothing new: one sync
    expect(results).toEqual([0, 0]);
  });

  test('does not tell of clusters that came after its first sync began; the next one does', () => {
    const { io, bitmap, sync, request } = overlay();
    bitmap.set(0, 0);
    const written: number[] = [];
    const writeBytes = io.writeBytes.bind(io);
    io.writeBytes = (who, fd, offset, bytes) => {
      written.push(bytes[0] as number);
      writeBytes(who, fd, offset, bytes);
    };
    sync.flush(request);
    bitmap.set(1, 1);
    for (let i = 0; i < 3; i++) io.end();
    expect([written, io.list]).toEqual([[1], []]);
    sync.flush(request);
    for (let i = 0; i < 3; i++) io.end();
    expect([written, io.list]).toEqual([[1, 3], []]);
  });

  test('serves all who ask before it begins, in one round', () => {
    const { io, sync, results, request } = overlay();
    sync.flush(request);
    for (let i = 0; i < 3; i++) sync.flush(request);
    expect(io.list).toHaveLength(1);
    io.end();
    expect(results).toEqual([0]);
    expect(io.list).toHaveLength(1);
    io.end();
    expect(results).toEqual([0, 0, 0, 0]);
  });

  test.each([0, 1, 2])('that fails at step %i is tried whole the next time, unless a sync failed', (step) => {
    const { io, bitmap, sync, results, request } = overlay();
    bitmap.set(0, 0);
    sync.flush(request);
    for (let i = 0; i < step; i++) io.end();
    io.end(step === 1 ? -28 : -EIO);
    expect(results).toEqual([step === 1 ? -28 : -EIO]);
    if (step !== 1) {
      expect(sync.flush(request)).toBe(-EIO);
      return;
    }
    expect(sync.flush(request)).toBe(PENDING);
    for (let i = 0; i < 3; i++) io.end();
    expect([results, io.list]).toEqual([[-28, 0], []]);
  });

  test('that writes a part of the bitmap has failed', () => {
    const { io, bitmap, sync, results, request } = overlay();
    bitmap.set(0, 0);
    sync.flush(request);
    io.end();
    io.end(100);
    expect(results).toEqual([-EIO]);
  });

  test('that a power-off abandons leaves its clusters to the next', () => {
    const { io, bitmap, sync, results, request } = overlay();
    bitmap.set(0, 0);
    sync.flush(request);
    io.end();
    io.submitted.length = 0;
    sync.abandon();
    sync.flush(request);
    io.end();
    expect(io.list).toEqual([`bytes 7@${BITMAP}+4096`]);
    expect(results).toEqual([]);
  });
});
