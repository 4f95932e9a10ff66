import { describe, expect, test } from 'vitest';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import type { DescriptorChain } from '#dist/virtio/chain.js';
import { queueProblem, Virtqueue } from '#dist/virtio/queue.js';
import { BUFFERS, Ring, type RingOptions, WRITE } from '../../support/virtio/ring.js';
import { WatchedMemory } from '../../support/virtio/watched-memory.js';

const RAM = 4 << 20;
const SIZES = [1, 2, 256, 32768];

function watched(): WatchedMemory {
  return new WatchedMemory([{ gpa: 0, buffer: new ArrayBuffer(RAM) }]);
}

/** A ring of which every descriptor is a buffer of one writable byte. */
function simple(size: number, options: RingOptions = {}): Ring {
  const ring = new Ring(size, options);
  for (let i = 0; i < size; i++) ring.describe(i, { gpa: BUFFERS + i, length: 1, flags: WRITE });
  return ring;
}

describe('2.7: the placement of a queue', () => {
  const memory = new GuestMemory([
    { gpa: 0, buffer: new ArrayBuffer(0x1_0000) },
    { gpa: 0x1_0000, buffer: new ArrayBuffer(0x1_0000) },
  ]);
  const good = { size: 8, descriptors: 0, available: 0x100, used: 0x200, nextAvailable: 0, nextUsed: 0 };
  const problem = (change: Partial<typeof good>, maximum = 256) =>
    queueProblem(memory, { ...good, ...change }, maximum);

  test('is a power of two up to the maximum', () => {
    for (const size of [1, 2, 4, 128, 256]) expect(problem({ size, used: 0x4000 })).toBeUndefined();
    for (const size of [0, 3, 5, 255, 257, 512, 0x1_0000, 2 ** 31, 2 ** 32 - 1]) {
      expect(problem({ size }), `${size}`).toBe(`a queue of ${size} descriptors`);
    }
    expect(problem({ size: 32768 }, 32768)).toBe('a descriptor table outside RAM'); // 512 KiB
  });

  test('2.7.1: is aligned', () => {
    for (const descriptors of [1, 2, 4, 8])
      expect(problem({ descriptors })).toBe('a descriptor table that is misaligned');
    expect(problem({ available: 0x101 })).toBe('an available ring that is misaligned');
    expect(problem({ available: 0x102 })).toBeUndefined();
    for (const used of [0x201, 0x202, 0x203]) expect(problem({ used })).toBe('a used ring that is misaligned');
    expect(problem({ used: 0x204 })).toBeUndefined();
  });

  test('is RAM to the last byte, of regions that touch too', () => {
    const end = 0x2_0000;
    expect(problem({ descriptors: end - 128 })).toBeUndefined();
    expect(problem({ descriptors: end - 112 })).toBe('a descriptor table outside RAM');
    expect(problem({ available: end - 22 })).toBeUndefined(); // used_event is part of it
    expect(problem({ available: end - 20 })).toBe('an available ring outside RAM');
    expect(problem({ used: end - 72 })).toBeUndefined(); // 70 bytes, avail_event among them
    expect(problem({ used: end - 68 })).toBe('a used ring outside RAM');
    expect(problem({ descriptors: 0x1_0000 - 64 })).toBeUndefined();
    for (const address of [2 ** 32, 2 ** 53, 2 ** 64 - 2 ** 12, 2 ** 64]) {
      expect(problem({ descriptors: address })).toBe('a descriptor table outside RAM');
      expect(problem({ available: address })).toBe('an available ring outside RAM');
      expect(problem({ used: address })).toBe('a used ring outside RAM');
    }
  });
});

describe.each(SIZES)('a queue of %d', (size) => {
  test('2.7.13.3: is used round and round, past index 65535', () => {
    const ring = simple(size, { start: 65530 });
    for (let n = 0; n < 20; n++) {
      const index = (65530 + n) & 0xffff;
      const head = (n * 7) % size;
      ring.offer(head);
      const chain = ring.pop();
      expect(chain.head).toBe(head);
      expect(ring.queue.pop()).toBeUndefined();
      expect(ring.usedIndex).toBe(index);
      ring.queue.push(chain, 1);
      ring.queue.publish();
      expect(ring.usedIndex).toBe((index + 1) & 0xffff);
      expect(ring.used(index)).toEqual({ id: head, length: 1 });
    }
    expect(ring.broken).toEqual([]);
    expect(ring.queue.state).toMatchObject({ nextAvailable: 14, nextUsed: 14 });
  });

  test('takes as many chains as it has descriptors at once', () => {
    const ring = simple(size, { start: 65535 });
    ring.offer(...Array.from({ length: size }, (_, i) => i));
    const chains: DescriptorChain[] = [];
    for (let chain = ring.queue.pop(); chain; chain = ring.queue.pop()) chains.push(chain);
    expect(chains.map(({ head }) => head)).toEqual(Array.from({ length: size }, (_, i) => i));
    for (const chain of chains) ring.queue.push(chain, 1);
    ring.queue.publish();
    expect(ring.usedIndex).toBe((65535 + size) & 0xffff);
    expect(ring.broken).toEqual([]);
  });

  test('2.7.6.1: ends with more available than it has descriptors, or fewer than there were', () => {
    for (const step of [size + 1, 0xffff]) {
      if (step > 0xffff) continue;
      const ring = simple(size, { start: 100 });
      ring.availIndex = (100 + step) & 0xffff;
      expect(ring.queue.pop()).toBeUndefined();
      expect(ring.broken).toEqual([`${step} chains available at a time in a queue of ${size}`]);
    }
  });
});

describe('2.7.6: avail.idx', () => {
  test('is not ahead of the used ring by more than the queue has descriptors, chains that the device holds counted', () => {
    const ring = simple(4);
    ring.offer(0, 1, 2, 3);
    const chains = [ring.pop(), ring.pop(), ring.pop()];
    ring.offer(0); // descriptor 0 is the device's still
    ring.pop(); // it was seen before
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.broken).toEqual(['5 chains available at a time in a queue of 4']);
    expect(chains).toHaveLength(3);
  });

  test('lets a device take no more than the queue has before it publishes', () => {
    const ring = simple(2);
    ring.offer(0, 0);
    ring.queue.push(ring.pop(), 0);
    ring.queue.push(ring.pop(), 0);
    ring.offer(0);
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.queue.alive).toBe(false);
  });

  test('is not fooled by 65536 chains in a queue of 32768', () => {
    const ring = new Ring(32768);
    ring.describe(0, { gpa: BUFFERS, length: 1 });
    ring.availIndex = 32768;
    for (let i = 0; i < 32768; i++) ring.pop();
    ring.availIndex = 0;
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.broken).toEqual(['65536 chains available at a time in a queue of 32768']);
  });

  test('is read again only when what it told of is taken', () => {
    const ring = simple(4);
    ring.offer(0, 1);
    ring.pop();
    ring.availIndex = 77;
    expect(ring.pop().head).toBe(1);
    expect(ring.queue.alive).toBe(true);
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.queue.alive).toBe(false);
  });
});

describe('a queue that was ended', () => {
  test.each(['broken', 'closed'])('does nothing any more: %s', (how) => {
    const memory = watched();
    const ring = simple(4, { memory });
    ring.offer(0, 1, 2);
    const chain = ring.pop();
    const pushed = ring.pop();
    ring.queue.push(pushed, 1);
    if (how === 'closed') ring.queue.close();
    else {
      ring.describe(2, { gpa: RAM, length: 1 });
      expect(ring.queue.pop()).toBeUndefined();
    }
    expect(ring.queue.alive).toBe(false);
    memory.accesses = 0;
    expect(ring.queue.pop()).toBeUndefined();
    ring.queue.push(chain, 1);
    ring.queue.publish();
    ring.queue.unpop(chain);
    expect(memory.accesses).toBe(0);
    expect(ring.interrupts).toBe(0);
    expect(ring.broken).toHaveLength(how === 'broken' ? 1 : 0);
  });
});

describe('2.7.8.2: the used ring', () => {
  test('has an entry with its length before used.idx tells of it', () => {
    const memory = watched();
    const ring = simple(4, { memory });
    ring.offer(2, 1);
    const stores: [number, number][] = [];
    memory.onStore = (gpa, _, value) => stores.push([gpa - ring.state.used, value as number]);
    const chains = [ring.pop(), ring.pop()];
    for (const chain of chains) ring.queue.push(chain, 5);
    expect(stores.map(([offset]) => offset).sort()).toEqual([12, 16, 4, 8].sort());
    ring.queue.publish();
    expect(stores[4]).toEqual([2, 2]);
    expect(stores).toHaveLength(5);
    expect([ring.used(0), ring.used(1)]).toEqual([
      { id: 2, length: 5 },
      { id: 1, length: 5 },
    ]);
  });

  test('takes chains back in any order', () => {
    const ring = simple(8);
    ring.offer(0, 1, 2, 3);
    const [a, b, c, d] = [ring.pop(), ring.pop(), ring.pop(), ring.pop()];
    ring.queue.push(c, 3);
    ring.queue.push(a, 0);
    ring.queue.publish();
    expect(ring.usedIndex).toBe(2);
    ring.queue.push(d, 2 ** 32 - 1);
    ring.queue.push(b, 1);
    ring.queue.publish();
    expect([0, 1, 2, 3].map((i) => ring.used(i))).toEqual([
      { id: 2, length: 3 },
      { id: 0, length: 0 },
      { id: 3, length: 2 ** 32 - 1 },
      { id: 1, length: 1 },
    ]);
  });

  test('shows nothing before publish(), and no interrupt comes of nothing', () => {
    const ring = simple(8);
    ring.queue.publish();
    ring.offer(0, 1);
    ring.queue.push(ring.pop(), 1);
    expect([ring.usedIndex, ring.interrupts]).toEqual([0, 0]);
    ring.queue.push(ring.pop(), 1);
    ring.queue.publish();
    expect([ring.usedIndex, ring.interrupts]).toEqual([2, 1]);
    ring.queue.publish();
    expect([ring.usedIndex, ring.interrupts]).toEqual([2, 1]);
  });

  test('costs no new chain once a queue has as many as are in use at a time', () => {
    const ring = simple(4);
    const seen = new Set<DescriptorChain>();
    for (let n = 0; n < 50; n++) {
      ring.offer(0, 1, 2);
      const chains = [ring.pop(), ring.pop(), ring.pop()];
      for (const chain of chains) {
        seen.add(chain);
        ring.queue.push(chain, 0);
      }
      ring.queue.publish();
    }
    expect(seen.size).toBe(3);
  });
});

describe('unpop', () => {
  test('gives the chain again, as it is then', () => {
    const ring = simple(4);
    ring.offer(0, 3);
    const chain = ring.pop();
    ring.queue.unpop(chain);
    expect(ring.queue.state.nextAvailable).toBe(0);
    ring.describe(0, { gpa: BUFFERS, length: 9 });
    const again = ring.pop();
    expect(again).toBe(chain);
    expect(again.readable.length).toBe(9);
    expect(ring.pop().head).toBe(3);
    expect(ring.queue.pop()).toBeUndefined();
  });

  test('goes back past index 0', () => {
    const ring = simple(2, { start: 65535 });
    ring.offer(1);
    ring.queue.unpop(ring.pop());
    expect(ring.queue.state.nextAvailable).toBe(65535);
    ring.use();
    expect(ring.used(65535)).toEqual({ id: 1, length: 0 });
    expect(ring.broken).toEqual([]);
  });

  test('leaves a full queue full', () => {
    const ring = simple(2);
    ring.offer(0, 1);
    for (let n = 0; n < 10; n++) {
      const first = ring.pop();
      ring.queue.unpop(ring.pop());
      ring.queue.unpop(first);
    }
    ring.use();
    ring.use();
    expect(ring.broken).toEqual([]);
  });
});

test('a queue goes on from its state', () => {
  const ring = simple(4, { start: 65534 });
  ring.offer(0, 1, 2, 3);
  ring.use();
  ring.use();
  ring.pop(); // lost with the queue
  const { state } = ring.queue;
  expect(state).toEqual({ ...ring.state, nextAvailable: 1, nextUsed: 0 });
  const options = { eventIndex: false, indirect: false, limit: 4, interrupt: () => {}, broken: () => {} };
  const next = new Virtqueue(ring.memory, state, options);
  const chain = next.pop();
  expect(chain?.head).toBe(3);
  if (chain) next.push(chain, 1);
  next.publish();
  expect(ring.usedIndex).toBe(1);
  expect(ring.used(0)).toEqual({ id: 3, length: 1 });
});

describe('2.7.7.2: used buffer notifications without EVENT_IDX', () => {
  test('come once for each publish, unless the driver does not want them', () => {
    const ring = simple(4);
    const interrupts = [0, 1, 2, 3].map((flags) => {
      ring.availFlags = flags;
      ring.offer(0);
      ring.use();
      return ring.interrupts;
    });
    expect(interrupts).toEqual([1, 1, 2, 2]); // 1 is NO_INTERRUPT; 2 means nothing
  });

  test('do not depend on used_event, nor does the device write avail_event', () => {
    const ring = simple(4);
    ring.usedEvent = 1000;
    ring.memory.writeU16(ring.state.used + 4 + 8 * 4, 0xbeef);
    ring.offer(0);
    ring.use();
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.interrupts).toBe(1);
    expect(ring.availEvent).toBe(0xbeef);
  });
});

describe('2.7.7.2: used buffer notifications with EVENT_IDX', () => {
  test('come exactly when an entry of index used_event is used, in batches of every length', () => {
    for (const start of [0, 3, 65533]) {
      for (let batch = 1; batch <= 8; batch++) {
        for (let event = -2; event < 10; event++) {
          const ring = simple(8, { start, eventIndex: true });
          ring.usedEvent = (start + event) & 0xffff;
          ring.offer(...Array.from({ length: batch }, (_, i) => i));
          for (let i = 0; i < batch; i++) ring.queue.push(ring.pop(), 0);
          ring.queue.publish();
          const wanted = event >= 0 && event < batch;
          expect(ring.interrupts, `start ${start}, batch ${batch}, event ${event}`).toBe(wanted ? 1 : 0);
        }
      }
    }
  });

  test('do not depend on the flags', () => {
    const ring = simple(4, { eventIndex: true });
    ring.availFlags = 1;
    ring.usedEvent = 0;
    ring.offer(0);
    ring.use();
    expect(ring.interrupts).toBe(1);
    ring.availFlags = 0;
    ring.offer(0);
    ring.use();
    expect(ring.interrupts).toBe(1);
  });

  test('come in a batch as long as the longest queue', () => {
    const ring = simple(32768, { eventIndex: true, start: 40000 });
    for (const [event, interrupts] of [
      [40000, 1],
      [(40000 + 2 * 32768 - 1) & 0xffff, 2],
      [39999, 2],
    ] as const) {
      ring.usedEvent = event;
      ring.offer(...Array.from({ length: 32768 }, (_, i) => i));
      for (let i = 0; i < 32768; i++) ring.queue.push(ring.pop(), 0);
      ring.queue.publish();
      expect(ring.interrupts, `event ${event}`).toBe(interrupts);
    }
  });
});

describe('2.7.10.2: available buffer notifications', () => {
  test('used.flags is never written', () => {
    for (const eventIndex of [false, true]) {
      const memory = watched();
      const ring = simple(4, { memory, eventIndex });
      const stores: number[] = [];
      memory.onStore = (gpa) => stores.push(gpa);
      ring.offer(0, 1);
      ring.use();
      ring.use();
      expect(ring.queue.pop()).toBeUndefined();
      expect(stores).not.toContain(ring.state.used);
      expect(ring.usedFlags).toBe(0);
    }
  });

  test.each(SIZES)('with EVENT_IDX, avail_event asks for the next one when the queue of %d is empty', (size) => {
    const ring = simple(size, { start: 65535, eventIndex: true });
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.availEvent).toBe(65535);
    for (let n = 0; n < 3; n++) {
      ring.offer(0);
      ring.use();
      expect(ring.queue.pop()).toBeUndefined();
      expect(ring.availEvent).toBe(n);
    }
  });

  test('a chain that comes just before avail_event is written is not missed', () => {
    const memory = watched();
    const ring = simple(4, { memory, eventIndex: true });
    memory.onStore = (gpa) => {
      if (gpa !== ring.state.used + 4 + 8 * 4) return;
      memory.onStore = undefined;
      ring.offer(3);
    };
    expect(ring.queue.pop()?.head).toBe(3);
  });

  test('a device that leaves chains in the queue asks for none', () => {
    const ring = simple(4, { eventIndex: true });
    ring.memory.writeU16(ring.state.used + 4 + 8 * 4, 0xbeef);
    ring.offer(0, 1);
    ring.use();
    ring.queue.unpop(ring.pop());
    expect(ring.availEvent).toBe(0xbeef);
  });
});

test('rings that overlap one another and their buffers harm their driver alone', () => {
  const memory = watched();
  const ring = simple(4, { memory, eventIndex: true });
  // The used ring over the available ring: each push and publish writes what is read as available.
  const { available } = ring.state;
  const used = (available + 3) & ~3;
  const broken: string[] = [];
  const queue = new Virtqueue(
    memory,
    { ...ring.state, used },
    { eventIndex: true, indirect: true, limit: 4, interrupt: () => {}, broken: (what) => broken.push(what) },
  );
  memory.budget = 2000;
  for (let round = 0; round < 20; round++) {
    ring.offer(round & 3, 2, 1);
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      chain.writable.write(0, Uint8Array.of(round));
      queue.push(chain, 1);
    }
    queue.publish();
  }
  expect(broken.length).toBeLessThanOrEqual(1);
  // A buffer over avail.idx: what the device writes makes the next chain available, for ever.
  const endless = simple(4, { memory: watched() });
  const watch = endless.memory as WatchedMemory;
  watch.budget = 500;
  endless.describe(0, { gpa: endless.state.available + 2, length: 2, flags: WRITE });
  endless.offer(0);
  let taken = 0;
  for (let chain = endless.queue.pop(); chain; chain = endless.queue.pop()) {
    taken++;
    chain.writable.write(0, Uint8Array.of(taken + 1, 0));
    endless.queue.push(chain, 2);
  }
  endless.queue.publish();
  expect(taken).toBe(4);
  expect(endless.broken).toEqual(['5 chains available at a time in a queue of 4']);
});
