import { describe } from 'vitest';
import { test } from './machines.js';

const seen = new Set<unknown>();

test('has a machine that runs', ({ machine, expect }) => {
  expect(machine.state).toBe('running');
  expect(machine.consoleTail()).toBe('a line of the guest');
  seen.add(machine);
});

describe('another test', () => {
  test('has another machine', async ({ machine, expect }) => {
    expect(seen.has(machine)).toBe(false);
    expect([...seen]).toMatchObject([{ state: 'ended' }]);
    await machine.stop();
    seen.add(machine);
  });
});

for (const one of [1, 2]) {
  test.concurrent(`has one of its own at the same time (${one})`, ({ machine }) => void seen.add(machine));
}

test('has one after those', ({ machine, expect }) => {
  expect(seen.size).toBe(4);
  expect(seen.has(machine)).toBe(false);
});

test('needs none', ({ expect }) => {
  expect(test).toBeTypeOf('function');
});
