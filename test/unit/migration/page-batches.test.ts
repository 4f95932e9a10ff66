import { readSync } from 'node:fs';
import { expect, test } from 'vitest';
import type { GuestRam } from '#dist/machine/guest-ram.js';
import { MAX_BATCH_DATA, MAX_BATCH_PAGES, PageBatches } from '#dist/machine/page-batches.js';
import { ReceivedMemory } from '#dist/migration/received-memory.js';
import { randomIntegers } from '../../support/boot-images.js';

const PAGE = 4096;

/** Guest memory of some regions, of which the test says what is dirty. */
function ram(...sizes: number[]) {
  const regions = sizes.map((pages, i) => [i * 2 ** 32, { buffer: new ArrayBuffer(pages * PAGE) }] as const);
  const pages = sizes.reduce((sum, size) => sum + size, 0);
  const dirty = new Set<number>();
  const fake = {
    regions,
    pages,
    tracksDirtyPages: false,
    trackDirtyPages(on: boolean) {
      fake.tracksDirtyPages = on;
    },
    takeDirtyPages(into: Uint8Array) {
      for (const page of dirty) into[page] = 1;
      dirty.clear();
    },
  };
  const write = (page: number, byte: number) => {
    let first = 0;
    for (const [, { buffer }] of regions) {
      if (page < first + buffer.byteLength / PAGE) {
        new Uint8Array(buffer)[(page - first) * PAGE + (page % PAGE)] = byte;
        break;
      }
      first += buffer.byteLength / PAGE;
    }
    dirty.add(page);
  };
  const all = () => Buffer.concat(regions.map(([, { buffer }]) => Buffer.from(buffer)));
  return { ram: fake as unknown as GuestRam, write, all, fake };
}

test('what is taken of it, round by round, is the memory of the last round', () => {
  const seed = Number(process.env.TSVISOR_SEED ?? Date.now() % 2 ** 31);
  const random = randomIntegers(seed);
  const { ram: memory, write, all } = ram(300, 500);
  for (let i = 0; i < 400; i++) write(random(800), 1 + random(255));
  const source = new PageBatches(memory);
  using received = new ReceivedMemory(800 * PAGE);
  for (let round = 0; round < 5; round++) {
    while (source.remaining > 0) {
      const batch = Buffer.from(source.take());
      expect(batch.readUInt32LE(0)).toBeLessThanOrEqual(MAX_BATCH_PAGES);
      received.take(batch);
      if (round < 4) write(random(800), random(256)); // also pages of this round that were taken, or not yet
    }
    received.round();
    source.round();
    if (round === 3) expect(source.remaining).toBeGreaterThan(0);
  }
  const { fd } = received.finish();
  expect(readAll(fd, 800 * PAGE).equals(all()), `seed ${seed}`).toBe(true);
});

test('pages of zeros go as numbers, others in batches of a MiB', () => {
  const { ram: memory, write } = ram(1000);
  for (let page = 0; page < 600; page++) write(page, 1);
  const source = new PageBatches(memory);
  const sizes: number[] = [];
  while (source.remaining > 0) sizes.push(source.take().length);
  expect(sizes.map((size) => Math.floor(size / PAGE))).toEqual([
    MAX_BATCH_DATA,
    MAX_BATCH_DATA,
    600 - 2 * MAX_BATCH_DATA,
  ]);
  expect(Math.max(...sizes)).toBeLessThanOrEqual(2 ** 20);
});

test('what was noted before goes on being noted, and only that', () => {
  for (const before of [true, false]) {
    const { ram: memory, fake } = ram(1);
    fake.tracksDirtyPages = before;
    const source = new PageBatches(memory);
    expect(fake.tracksDirtyPages).toBe(true);
    source.end();
    expect(fake.tracksDirtyPages).toBe(before);
  }
});

function readAll(fd: number, size: number): Buffer {
  const bytes = Buffer.alloc(size);
  expect(readSync(fd, bytes, 0, size, 0)).toBe(size);
  return bytes;
}
