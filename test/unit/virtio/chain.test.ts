import { describe, expect, test } from 'vitest';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import type { DescriptorChain } from '#dist/virtio/chain.js';
import type { Segments } from '#dist/virtio/segments.js';
import { BUFFERS, type Descriptor, INDIRECT, NEXT, Ring, type RingOptions, WRITE } from '../../support/virtio/ring.js';

const RAM = 4 << 20;
const TABLE = 0x10_0000;

function parts(segments: Segments): number[][] {
  return Array.from({ length: segments.count }, (_, i) => [...segments.pairs.subarray(2 * i, 2 * i + 2)]);
}

/** The readable and the writable parts of a chain. */
function layout(chain: DescriptorChain): { readable: number[][]; writable: number[][] } {
  return { readable: parts(chain.readable), writable: parts(chain.writable) };
}

/** What a chain that starts at descriptor 0 is taken for: its layout, or why its queue was ended. */
function load(descriptors: readonly Descriptor[], options: RingOptions & { size?: number } = {}) {
  const ring = new Ring(options.size ?? 8, options);
  descriptors.forEach((descriptor, i) => {
    ring.describe(i, descriptor);
  });
  ring.offer(0);
  const chain = ring.queue.pop();
  return chain ? layout(chain) : ring.broken.join();
}

/** As load(), with an indirect table that descriptor 0 names. */
function loadIndirect(
  table: readonly Descriptor[],
  head: Partial<Descriptor> = {},
  options: RingOptions & { size?: number } = {},
) {
  const ring = new Ring(options.size ?? 8, options);
  table.forEach((descriptor, i) => {
    ring.describe(i, descriptor, TABLE);
  });
  ring.describe(0, { gpa: TABLE, length: 16 * table.length, flags: INDIRECT, ...head });
  ring.offer(0);
  const chain = ring.queue.pop();
  return chain ? layout(chain) : ring.broken.join();
}

describe('2.7.5: a chain', () => {
  test('has the readable buffers first, then the writable ones, in their order', () => {
    const chain = load([
      { gpa: BUFFERS + 5, length: 3, flags: NEXT, next: 7 },
      { gpa: BUFFERS + 500, length: 9, flags: WRITE | 0xfff8, next: 1 },
      { gpa: BUFFERS, length: 1 },
      { gpa: BUFFERS + 300, length: 4, flags: NEXT | WRITE, next: 1 },
      { gpa: BUFFERS, length: 1 },
      { gpa: BUFFERS, length: 1 },
      { gpa: BUFFERS, length: 1 },
      { gpa: BUFFERS + 3, length: 2, flags: NEXT, next: 3 },
    ]);
    expect(chain).toEqual({
      readable: [
        [BUFFERS + 5, 3],
        [BUFFERS + 3, 2],
      ],
      writable: [
        [BUFFERS + 300, 4],
        [BUFFERS + 500, 9],
      ],
    });
  });

  test('ends the queue with a readable buffer after a writable one', () => {
    const bad = load([
      { gpa: BUFFERS, length: 1, flags: NEXT | WRITE, next: 1 },
      { gpa: BUFFERS, length: 1 },
    ]);
    expect(bad).toBe('a readable buffer after a writable one');
  });

  test('may have empty buffers, which are nowhere', () => {
    const chain = load([
      { gpa: 2n ** 64n - 1n, length: 0, flags: NEXT | WRITE, next: 1 },
      { gpa: BUFFERS, length: 2, flags: NEXT, next: 2 },
      { gpa: RAM, length: 0, flags: NEXT, next: 3 },
      { gpa: BUFFERS, length: 3, flags: WRITE | NEXT, next: 4 },
      { gpa: 0, length: 0 },
    ]);
    expect(chain).toEqual({ readable: [[BUFFERS, 2]], writable: [[BUFFERS, 3]] });
    expect(load([{ gpa: 0, length: 0 }])).toEqual({ readable: [], writable: [] });
  });

  test('ends the queue with a head or a next one outside the table', () => {
    const ring = new Ring(4);
    ring.offer(4);
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.broken).toEqual(['descriptor 4 of a table of 4']);
    expect(load([{ gpa: BUFFERS, length: 1, flags: NEXT, next: 8 }])).toBe('descriptor 8 of a table of 8');
    expect(load([{ gpa: BUFFERS, length: 1, flags: NEXT, next: 0xffff }])).toBe('descriptor 65535 of a table of 8');
  });

  test.each([
    [2n ** 22n - 1n, 1, true],
    [2n ** 22n - 1n, 2, false],
    [2n ** 22n, 1, false],
    [0n, 2 ** 22, true],
    [0n, 2 ** 22 + 1, false],
    [0n, 2 ** 32 - 1, false],
    [2n ** 32n, 1, false],
    [2n ** 32n + BigInt(BUFFERS), 1, false],
    [2n ** 53n - 1n, 1, false],
    [2n ** 53n, 1, false],
    [2n ** 63n + BigInt(BUFFERS), 1, false],
    [2n ** 64n - 1n, 1, false],
    [2n ** 64n - 8n, 16, false],
    [2n ** 64n - 2n ** 31n, 2 ** 32 - 1, false],
  ])('has RAM alone: address %d, length %d: %s', (gpa, length, good) => {
    for (const flags of [0, WRITE]) {
      const result = load([{ gpa, length, flags }]);
      if (!good) expect(result).toBe('a buffer outside RAM');
      else expect(Object.values(result).flat()).toEqual([[Number(gpa), length]]);
    }
  });

  test('goes over the edge of regions that touch, and not over a gap; as does the table', () => {
    // The table is at 0x1000: 72 bytes of it in the first region.
    const memory = new GuestMemory([
      { gpa: 0, buffer: new ArrayBuffer(0x1048) },
      { gpa: 0x1048, buffer: new ArrayBuffer(0x8000) },
      { gpa: 0xa000, buffer: new ArrayBuffer(0x1000) },
    ]);
    const ring = new Ring(8, { memory });
    const whole = { gpa: 0x1040, length: 16 };
    ring.describe(4, { gpa: 0x9047, length: 1, flags: NEXT, next: 5 });
    ring.describe(5, whole);
    ring.describe(6, { gpa: 0x9047, length: 2 });
    ring.offer(4, 6);
    const chain = ring.pop();
    expect(parts(chain.readable)).toEqual([
      [0x9047, 1],
      [0x1040, 16],
    ]);
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.broken).toEqual(['a buffer outside RAM']);
  });

  test('was read once: what the guest writes since changes nothing', () => {
    const ring = new Ring(4);
    ring.describeChain([
      { gpa: BUFFERS, length: 7 },
      { gpa: BUFFERS + 7, length: 8, flags: WRITE },
    ]);
    ring.offer(0);
    const chain = ring.pop();
    const before = layout(chain);
    ring.memory.zero(ring.state.descriptors, 64);
    ring.describe(0, { gpa: RAM, length: 1 });
    expect(layout(chain)).toEqual(before);
    expect([chain.readable.length, chain.writable.length]).toEqual([7, 8]);
  });

  test('that is used again has nothing of the one before', () => {
    const ring = new Ring(4);
    ring.describeChain([
      { gpa: BUFFERS, length: 7 },
      { gpa: BUFFERS + 7, length: 8, flags: WRITE },
    ]);
    ring.describe(3, { gpa: 1, length: 1 });
    ring.offer(0);
    const first = ring.pop();
    ring.queue.push(first, 0);
    ring.queue.publish();
    ring.offer(3);
    const second = ring.pop();
    expect(second).toBe(first);
    expect(second.head).toBe(3);
    expect(layout(second)).toEqual({ readable: [[1, 1]], writable: [] });
  });
});

describe('2.7.4.1: the limit of descriptors in a chain', () => {
  const long = (length: number, last: Partial<Descriptor> = {}): Descriptor[] =>
    Array.from({ length }, (_, i) =>
      i < length - 1
        ? { gpa: BUFFERS + i, length: 1, flags: NEXT, next: i + 1 }
        : { gpa: BUFFERS + i, length: 1, ...last },
    );

  test('is met by a chain of as many', () => {
    expect(load(long(8), { limit: 8 })).toMatchObject({ readable: { length: 8 } });
    expect(load(long(5), { limit: 5 })).toMatchObject({ readable: { length: 5 } });
    expect(loadIndirect(long(20), {}, { limit: 20 })).toMatchObject({ readable: { length: 20 } });
  });

  test('ends the queue with one more', () => {
    expect(load(long(6), { limit: 5 })).toBe('a chain of more than 5 descriptors');
    expect(loadIndirect(long(21), {}, { limit: 20 })).toBe('a chain of more than 20 descriptors');
  });

  test('counts empty buffers', () => {
    const empty = long(8).map((descriptor) => ({ ...descriptor, length: 0 }));
    expect(load(empty, { limit: 7 })).toBe('a chain of more than 7 descriptors');
  });

  test('is what a loop ends at', () => {
    const loop = 'a chain of more than 8 descriptors';
    expect(load([{ gpa: BUFFERS, length: 1, flags: NEXT, next: 0 }])).toBe(loop);
    expect(load(long(8, { flags: NEXT, next: 3 }))).toBe(loop);
    expect(load([{ gpa: 0, length: 0, flags: NEXT, next: 0 }])).toBe(loop);
    expect(loadIndirect([{ gpa: BUFFERS, length: 1, flags: NEXT, next: 0 }])).toBe(loop);
    expect(loadIndirect(long(3, { flags: NEXT, next: 1 }))).toBe(loop);
    // In a queue of one descriptor of a device that takes more.
    const one = { size: 1, limit: 256 };
    expect(load([{ gpa: BUFFERS, length: 1, flags: NEXT, next: 0 }], one)).toBe('a chain of more than 256 descriptors');
  });

  test('counts direct and indirect descriptors together', () => {
    const ring = new Ring(8);
    ring.describe(0, { gpa: BUFFERS, length: 1, flags: NEXT, next: 1 });
    ring.describe(1, { gpa: BUFFERS, length: 1, flags: NEXT, next: 2 });
    ring.describe(2, { gpa: TABLE, length: 16 * 7, flags: INDIRECT });
    ring.describeChain(long(6), TABLE);
    ring.offer(0);
    expect(ring.pop().readable.count).toBe(8);
    ring.describe(5, { gpa: BUFFERS, length: 1, flags: NEXT, next: 6 }, TABLE);
    ring.offer(0);
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.broken).toEqual(['a chain of more than 8 descriptors']);
  });
});

describe('2.7.5.3.2: an indirect table', () => {
  const two: Descriptor[] = [
    { gpa: BUFFERS, length: 5, flags: NEXT, next: 2 },
    { gpa: 0, length: 1 },
    { gpa: BUFFERS + 9, length: 6, flags: WRITE },
  ];
  const twoParts = { readable: [[BUFFERS, 5]], writable: [[BUFFERS + 9, 6]] };

  test('is a chain that starts at its first descriptor', () => {
    expect(loadIndirect(two)).toEqual(twoParts);
  });

  test('is read whatever the WRITE flag and the next field of the descriptor that names it say', () => {
    expect(loadIndirect(two, { flags: INDIRECT | WRITE, next: 999 })).toEqual(twoParts);
  });

  test('may follow direct descriptors, of the same direction or another', () => {
    const ring = new Ring(8);
    ring.describe(0, { gpa: BUFFERS + 100, length: 1, flags: NEXT, next: 5 });
    ring.describe(5, { gpa: BUFFERS + 200, length: 2, flags: NEXT, next: 3 });
    ring.describe(3, { gpa: TABLE, length: 48, flags: INDIRECT | WRITE });
    two.forEach((descriptor, i) => {
      ring.describe(i, descriptor, TABLE);
    });
    ring.offer(0);
    expect(layout(ring.pop())).toEqual({
      readable: [[BUFFERS + 100, 1], [BUFFERS + 200, 2], ...twoParts.readable],
      writable: twoParts.writable,
    });
    // Writable ones before a table that starts with a readable one.
    ring.describe(5, { gpa: BUFFERS + 200, length: 2, flags: NEXT | WRITE, next: 3 });
    ring.offer(0);
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.broken).toEqual(['a readable buffer after a writable one']);
  });

  test('may be longer than the queue', () => {
    const table = Array.from({ length: 100 }, (_, i) => ({
      gpa: BUFFERS + i,
      length: 1,
      flags: i < 99 ? NEXT : 0,
      next: i + 1,
    }));
    expect(loadIndirect(table, {}, { size: 2, limit: 128 })).toMatchObject({ readable: { length: 100 } });
  });

  test('may be as large as memory, for the few descriptors that are used', () => {
    const head = { gpa: 0x1000 * 16, length: RAM - 0x1000 * 16 };
    const ring = new Ring(8);
    ring.describe(0, { ...head, flags: INDIRECT });
    ring.describe(0, { gpa: BUFFERS, length: 1, flags: NEXT, next: 0xffff }, head.gpa);
    ring.describe(0xffff, { gpa: BUFFERS, length: 2 }, head.gpa);
    ring.offer(0);
    expect(layout(ring.pop()).readable).toEqual([
      [BUFFERS, 1],
      [BUFFERS, 2],
    ]);
  });

  test('may be misaligned and end with RAM', () => {
    const ring = new Ring(8);
    ring.describe(0, { gpa: RAM - 16, length: 16, flags: INDIRECT });
    ring.describe(0, { gpa: BUFFERS, length: 1 }, RAM - 16);
    ring.describe(1, { gpa: TABLE + 3, length: 16, flags: INDIRECT });
    ring.describe(0, { gpa: BUFFERS, length: 2 }, TABLE + 3);
    ring.offer(0, 1);
    expect(layout(ring.pop()).readable).toEqual([[BUFFERS, 1]]);
    expect(layout(ring.pop()).readable).toEqual([[BUFFERS, 2]]);
  });

  test('ends the queue where it was not negotiated', () => {
    expect(loadIndirect(two, {}, { indirect: false })).toBe('an indirect descriptor, which was not negotiated');
  });

  test('ends the queue with another one inside', () => {
    const nested = [{ gpa: TABLE, length: 16, flags: INDIRECT }];
    expect(loadIndirect(nested)).toBe('an indirect descriptor inside an indirect table');
    expect(loadIndirect([{ ...(two[0] as Descriptor), next: 1 }, ...nested])).toBe(
      'an indirect descriptor inside an indirect table',
    );
  });

  test('ends the queue with a next descriptor after it', () => {
    expect(loadIndirect(two, { flags: INDIRECT | NEXT, next: 1 })).toBe('an indirect descriptor with a next one');
  });

  test.each([0, 1, 15, 17, 24, 47, 49])('ends the queue with a length of %d bytes', (length) => {
    expect(loadIndirect(two, { length })).toBe(`an indirect table of ${length} bytes`);
  });

  test.each([
    [RAM - 16, 32],
    [RAM - 15, 16],
    [RAM, 16],
    [0, RAM + 16],
    [0, 2 ** 32 - 16],
    [2n ** 64n - 16n, 16],
    [2n ** 64n - 16n, 32],
    [2n ** 53n, 16],
    [2n ** 32n + BigInt(TABLE), 16],
  ])('ends the queue outside RAM: address %d, length %d', (gpa, length) => {
    expect(loadIndirect(two, { gpa, length })).toBe('an indirect table outside RAM');
  });

  test('ends the queue with a next one outside it, though the ring or memory has one there', () => {
    expect(loadIndirect(two, { length: 32 })).toBe('descriptor 2 of a table of 2');
    expect(loadIndirect([{ gpa: BUFFERS, length: 1, flags: NEXT, next: 1 }])).toBe('descriptor 1 of a table of 1');
  });
});

test('2.7.5.1: the device writes no descriptor table, and only writable buffers', () => {
  const ring = new Ring(4);
  ring.memory.write(BUFFERS, new Uint8Array(100).fill(0x11));
  ring.describe(0, { gpa: BUFFERS, length: 10, flags: NEXT, next: 1 });
  ring.describe(1, { gpa: TABLE, length: 32, flags: INDIRECT });
  ring.describe(0, { gpa: BUFFERS + 20, length: 10, flags: NEXT, next: 1 }, TABLE);
  ring.describe(1, { gpa: BUFFERS + 40, length: 10, flags: WRITE }, TABLE);
  ring.offer(0);
  const tables = () =>
    [ring.state.descriptors, TABLE].map((gpa) => [...new Uint8Array(ring.memory.slice(gpa, 64))].join());
  const before = tables();
  const chain = ring.pop();
  expect(chain.writable.write(0, new Uint8Array(64).fill(0x22))).toBe(10);
  ring.queue.push(chain, 10);
  ring.queue.publish();
  expect(tables()).toEqual(before);
  const bytes = ring.memory.slice(BUFFERS, 100);
  expect([...bytes].every((byte, i) => byte === (i >= 40 && i < 50 ? 0x22 : 0x11))).toBe(true);
});

test('2.7.5.2: a chain has at most 2^32 bytes', () => {
  // Address space that is never touched: 1 GiB, which the chain's descriptors name again and again.
  const memory = new GuestMemory([{ gpa: 0, buffer: new ArrayBuffer(2 ** 30) }]);
  const GiB = { gpa: 0, length: 2 ** 30 };
  const ring = new Ring(8, { memory });
  ring.describeChain([GiB, GiB, { ...GiB, flags: WRITE }, { ...GiB, flags: WRITE }]);
  ring.offer(0);
  const chain = ring.pop();
  expect(chain.readable.length + chain.writable.length).toBe(2 ** 32);
  ring.describe(3, { ...GiB, flags: NEXT | WRITE, next: 4 });
  ring.describe(4, { gpa: 0, length: 1, flags: WRITE });
  ring.offer(0);
  expect(ring.queue.pop()).toBeUndefined();
  expect(ring.broken).toEqual(['a chain of more than 4 GiB']);
});
