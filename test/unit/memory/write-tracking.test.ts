import { describe, expect, test } from 'vitest';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { Random } from '../../kvm/assist/random.js';

const PAGE = 4096;
const HIGH = 4 * 1024 ** 3;
/** Two regions that touch, and one after a hole. */
const REGIONS = [
  { gpa: 0, pages: 4 },
  { gpa: 4 * PAGE, pages: 3 },
  { gpa: HIGH, pages: 2 },
] as const;

function guestMemory() {
  return new GuestMemory(REGIONS.map(({ gpa, pages }) => ({ gpa, buffer: new ArrayBuffer(pages * PAGE) })));
}

/** Guest physical addresses of the pages that were written. */
function taken(memory: GuestMemory): number[] {
  return REGIONS.flatMap(({ gpa, pages }) => {
    const into = new Uint8Array(pages);
    memory.takeWrites(gpa, into);
    return [...into].flatMap((mark, page) => (mark ? [gpa + page * PAGE] : []));
  });
}

function pagesOf(gpa: number, length: number): number[] {
  const first = Math.floor(gpa / PAGE) * PAGE;
  return Array.from({ length: Math.ceil((gpa + length - first) / PAGE) }, (_, i) => first + i * PAGE);
}

const writes: Record<string, (memory: GuestMemory, gpa: number, length: number) => void> = {
  write: (memory, gpa, length) => memory.write(gpa, new Uint8Array(length)),
  zero: (memory, gpa, length) => memory.zero(gpa, length),
  noteWrite: (memory, gpa, length) => memory.noteWrite(gpa, length),
};
const integers: Record<string, [number, (memory: GuestMemory, gpa: number) => void]> = {
  writeU8: [1, (memory, gpa) => memory.writeU8(gpa, 1)],
  writeU16: [2, (memory, gpa) => memory.writeU16(gpa, 1)],
  writeU32: [4, (memory, gpa) => memory.writeU32(gpa, 1)],
  writeU64: [8, (memory, gpa) => memory.writeU64(gpa, 1n)],
};

describe('every write is noted, by its pages', () => {
  for (const [name, write] of Object.entries(writes)) {
    for (const [gpa, length] of [
      [0, 1],
      [PAGE - 1, 1],
      [PAGE - 1, 2],
      [0, PAGE],
      [1, PAGE],
      [4 * PAGE - 1, 2], // from one region into the next
      [4 * PAGE - 20, 40],
      [4 * PAGE - 20, 30],
      [0, 7 * PAGE],
      [HIGH, 1],
      [HIGH + 2 * PAGE - 1, 1],
    ] as const) {
      test(`${name} of ${length} at ${gpa}`, () => {
        const memory = guestMemory();
        memory.trackWrites();
        write(memory, gpa, length);
        expect(taken(memory)).toEqual(pagesOf(gpa, length));
        expect(taken(memory)).toEqual([]);
      });
    }
  }

  for (const [name, [length, write]] of Object.entries(integers)) {
    test(name, () => {
      const memory = guestMemory();
      memory.trackWrites();
      for (const edge of [0, PAGE, 4 * PAGE, HIGH, HIGH + PAGE]) {
        for (let gpa = Math.max(edge - length, edge === HIGH ? HIGH : 0); gpa <= edge; gpa++) {
          write(memory, gpa);
          expect(taken(memory), String(gpa)).toEqual(pagesOf(gpa, length));
        }
      }
    });
  }

  test('a view that may be written', () => {
    const memory = guestMemory();
    memory.trackWrites();
    memory.slice(PAGE - 1, 2);
    expect(taken(memory)).toEqual([0, PAGE]);
    memory.slice(PAGE, 0);
    expect(taken(memory)).toEqual([]);
  });
});

test('what changes nothing is not noted: reads, empty writes, writes outside RAM', () => {
  const memory = guestMemory();
  memory.trackWrites();
  memory.read(0, new Uint8Array(7 * PAGE));
  memory.readU64(PAGE - 4);
  memory.write(5, new Uint8Array(0));
  memory.zero(5, 0);
  memory.noteWrite(7 * PAGE, PAGE);
  memory.noteWrite(0, -1);
  expect(() => memory.write(7 * PAGE - 1, new Uint8Array(2))).toThrow();
  expect(() => memory.write(7 * PAGE - 100, new Uint8Array(200))).toThrow();
  expect(() => memory.zero(HIGH + 2 * PAGE - 1, 2)).toThrow();
  expect(() => memory.slice(4 * PAGE - 1, 2)).toThrow(); // no view is of two regions
  expect(() => memory.writeU32(HIGH - 2, 1)).toThrow();
  expect(taken(memory)).toEqual([]);
});

test('nothing is noted before it is asked for, nor after, nor from before when it is asked for again', () => {
  const memory = guestMemory();
  memory.write(0, Uint8Array.of(1));
  expect(taken(memory)).toEqual([]);
  memory.trackWrites();
  memory.write(0, Uint8Array.of(1));
  memory.trackWrites();
  expect(taken(memory)).toEqual([]);
  memory.write(0, Uint8Array.of(1));
  memory.ignoreWrites();
  memory.write(PAGE, Uint8Array.of(1));
  expect(taken(memory)).toEqual([]);
});

test('what was taken adds to what is marked already', () => {
  const memory = guestMemory();
  memory.trackWrites();
  memory.write(PAGE, Uint8Array.of(1));
  const into = Uint8Array.of(0, 0, 1, 0);
  memory.takeWrites(0, into);
  expect([...into]).toEqual([0, 1, 1, 0]);
});

test('whatever is written, in whatever order: exactly the pages that changed or might have', () => {
  const random = new Random();
  const memory = guestMemory();
  memory.trackWrites();
  for (let n = 0; n < 500; n++) {
    const expected = new Set<number>();
    for (let i = random.below(6); i > 0; i--) {
      const { gpa, pages } = random.pick(REGIONS);
      const at = gpa + random.below(pages * PAGE);
      const [name, [length, write]] = random.pick(Object.entries(integers));
      const long = random.below(random.pick([2, 40, 3 * PAGE]));
      try {
        if (random.chance(50)) {
          write(memory, at);
          for (const page of pagesOf(at, length)) expected.add(page);
        } else {
          random.pick(Object.values(writes).slice(0, 2))(memory, at, long);
          if (long > 0) for (const page of pagesOf(at, long)) expected.add(page);
        }
      } catch (error) {
        expect((error as Error).name, name).toBe('GuestMemoryRangeError');
      }
    }
    expect(taken(memory), `seed ${random.seed}`).toEqual([...expected].sort((a, b) => a - b));
  }
});
