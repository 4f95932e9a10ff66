import { describe, expect, test } from 'vitest';
import { BUFFERS, Ring } from '../../support/virtio/ring.js';

describe('2.7.13.3: avail.idx', () => {
  test('is not ahead of the used ring by more than the queue has descriptors, chains that the device holds counted', () => {
    const ring = new Ring(4);
    for (let i = 0; i < 4; i++) ring.describe(i, { gpa: BUFFERS, length: 1 });
    ring.offer(0, 1, 2, 3);
    const chains = [ring.pop(), ring.pop(), ring.pop()];
    ring.offer(0); // descriptor 0 is the device's still
    ring.pop(); // it was seen before
    expect(ring.queue.pop()).toBeUndefined();
    expect(ring.broken).toEqual(['5 chains available at a time in a queue of 4']);
    expect(chains).toHaveLength(3);
  });

  test('lets a device take no more than the queue has before it publishes', () => {
    const ring = new Ring(2);
    ring.describe(0, { gpa: BUFFERS, length: 1 });
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
});
