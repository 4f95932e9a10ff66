import { readSync } from 'node:fs';
import { expect, test } from 'vitest';
import { ReceivedMemory } from '#dist/migration/received-memory.js';

const PAGE = 4096;
const PAGES = 8;

/** A batch as PageSource makes it. */
function batch(entries: readonly (readonly [page: number, fill?: number | undefined])[], extra = 0): Buffer {
  const numbers = Buffer.alloc(4 + 4 * entries.length);
  numbers.writeUInt32LE(entries.length, 0);
  for (const [i, [page, fill]] of entries.entries()) {
    numbers.writeUInt32LE((page * 2 + (fill === undefined ? 0 : 1)) >>> 0, 4 + 4 * i);
  }
  const contents = entries.flatMap(([, fill]) => (fill === undefined ? [] : [Buffer.alloc(PAGE, fill)]));
  return Buffer.concat([numbers, ...contents, Buffer.alloc(extra)]);
}

const all = (fill?: number) => batch(Array.from({ length: PAGES }, (_, page) => [page, fill] as const));

function contents(memory: ReceivedMemory): number[] {
  const { fd } = memory.finish();
  const bytes = new Uint8Array(PAGES * PAGE);
  expect(readSync(fd, bytes, 0, bytes.length, 0)).toBe(bytes.length);
  return Array.from({ length: PAGES }, (_, page) => {
    const part = bytes.subarray(page * PAGE, (page + 1) * PAGE);
    expect(part.every((byte) => byte === part[0])).toBe(true);
    return part[0] as number;
  });
}

test('every round overwrites what the rounds before brought, also with zeros', () => {
  using memory = new ReceivedMemory(PAGES * PAGE);
  memory.take(batch([[0, 1], [1], [2, 3], [3, 4]]));
  memory.take(batch([[4, 5], [5], [6], [7, 8]]));
  memory.round();
  memory.take(batch([[0], [5, 9], [7, 7]]));
  memory.round();
  memory.round();
  expect(contents(memory)).toEqual([0, 0, 3, 4, 5, 9, 0, 7]);
});

test.each<[string, Buffer, string]>([
  ['no bytes', Buffer.alloc(0), 'a batch without pages'],
  ['no pages', batch([]), 'a batch without pages'],
  ['more pages than it has numbers', Buffer.from([2, 0, 0, 0, 0, 0, 0, 0]), 'a batch without pages'],
  ['more pages than any', Buffer.concat([Buffer.from([1, 16, 0, 0]), Buffer.alloc(4 * 4097)]), 'a batch without pages'],
  ['a page outside', batch([[PAGES, 1]]), `page ${PAGES}, which`],
  ['a page far outside', batch([[2 ** 31 - 1, 1]]), `page ${2 ** 31 - 1}, which`],
  [
    'a page twice',
    batch([
      [3, 1],
      [3, 1],
    ]),
    'page 3, which',
  ],
  ['pages backwards', batch([[3, 1], [2]]), 'page 2, which'],
  ['contents cut off', batch([[0, 1]]).subarray(0, -1), 'a page without its contents'],
  ['contents too many', batch([[0, 1]], 1), 'contents of no page'],
])('a batch with %s is refused', (_, bytes, why) => {
  using memory = new ReceivedMemory(PAGES * PAGE);
  expect(() => memory.take(bytes)).toThrow(`the other side sent ${why}`);
});

test('a page twice in a round is refused, also in another batch', () => {
  using memory = new ReceivedMemory(PAGES * PAGE);
  memory.take(
    batch([
      [0, 1],
      [1, 1],
    ]),
  );
  expect(() => memory.take(batch([[1, 2]]))).toThrow('page 1, which');
});

test('a machine without all of its memory is refused', () => {
  using memory = new ReceivedMemory(PAGES * PAGE);
  expect(() => memory.finish()).toThrow('a machine without its memory');
  memory.take(batch([[0, 1]]));
  expect(() => memory.round()).toThrow(`1 of ${PAGES} pages`);
});

test('nothing of it stays open', () => {
  const memory = new ReceivedMemory(PAGES * PAGE);
  memory.take(all(1));
  memory.round();
  const { fd } = memory.finish();
  memory[Symbol.dispose]();
  memory[Symbol.dispose]();
  expect(() => readSync(fd, new Uint8Array(1), 0, 1, 0)).toThrow('EBADF');
});
