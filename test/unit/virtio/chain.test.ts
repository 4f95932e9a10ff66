import { expect, test } from 'vitest';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { NEXT, Ring } from '../../support/virtio/ring.js';

test('2.7.5.2: a chain has at most 2^32 bytes', () => {
  // Address space that is never touched: 1 GiB, which the chain's descriptors name again and again.
  const memory = new GuestMemory([{ gpa: 0, buffer: new ArrayBuffer(2 ** 30) }]);
  const GiB = { gpa: 0, length: 2 ** 30 };
  const ring = new Ring(8, { memory });
  ring.describeChain([GiB, GiB, GiB, GiB]);
  ring.offer(0);
  expect(ring.pop().readable.length).toBe(2 ** 32);
  ring.describe(3, { ...GiB, flags: NEXT, next: 4 });
  ring.describe(4, { gpa: 0, length: 1 });
  ring.offer(0);
  expect(ring.queue.pop()).toBeUndefined();
  expect(ring.broken).toEqual(['a chain of more than 4 GiB']);
});
