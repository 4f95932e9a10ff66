import { describe, expect, test } from 'vitest';
import { dirtyExtents, MAX_EXTENTS } from '#dist/machine/dirty-extents.js';
import { Random } from '../../kvm/assist/random.js';

function pages(count: number, marked: Iterable<number>): Uint8Array {
  const all = new Uint8Array(count);
  for (const page of marked) all[page] = 1;
  return all;
}

describe('extents of written pages', () => {
  for (const [what, marked, extents] of [
    ['none', [], []],
    ['the first', [0], [[0, 1]]],
    ['the last', [99], [[99, 1]]],
    ['a run', [3, 4, 5], [[3, 3]]],
    ['two with one between them are taken as one', [3, 5], [[3, 3]]],
    ['two with two between them are two', [3, 6], [[3, 1], [6, 1]]], // biome-ignore format: pairs
    ['all', [...Array(100).keys()], [[0, 100]]],
  ] as [string, number[], number[][]][]) {
    test(what, () => expect(dirtyExtents(pages(100, marked))).toEqual(extents));
  }

  test('have all written pages, in order, apart, few, and mark what they have', () => {
    const random = new Random();
    for (let n = 0; n < 200; n++) {
      const count = 1 + random.below(random.pick([10, 1000, 100_000]));
      const share = random.pick([0, 1, 10, 50, 90, 100]);
      const before = Uint8Array.from({ length: count }, () => (random.chance(share) ? 1 : 0));
      const marked = before.slice();
      const extents = dirtyExtents(marked);
      const covered = new Uint8Array(count);
      let end = -1;
      for (const [page, length] of extents) {
        expect(page, `seed ${random.seed}`).toBeGreaterThan(end);
        expect(length).toBeGreaterThan(0);
        end = page + length; // not even touching: they would be one
        expect(before[page]).toBe(1);
        expect(before[end - 1]).toBe(1);
        covered.fill(1, page, end);
      }
      expect(end).toBeLessThanOrEqual(count);
      expect(extents.length).toBeLessThanOrEqual(MAX_EXTENTS);
      expect(Buffer.compare(covered, marked)).toBe(0);
      expect(before.every((mark, page) => mark === 0 || covered[page] === 1)).toBe(true);
    }
  });

  test('as many pieces as can be', () => {
    const apart = (distance: number, count: number) =>
      pages(
        distance * count,
        [...Array(count).keys()].map((i) => i * distance),
      );
    expect(dirtyExtents(apart(3, MAX_EXTENTS))).toHaveLength(MAX_EXTENTS);
    expect(dirtyExtents(apart(3, MAX_EXTENTS + 1))).toHaveLength(1);
    expect(dirtyExtents(apart(1000, 2 * MAX_EXTENTS)).length).toBeLessThanOrEqual(MAX_EXTENTS);
  });
});
