import { expect, test } from 'vitest';
import { Random } from '../kvm/assist/random.js';
import { fuzz, replay } from './run.js';
import { targets } from './targets/index.js';

const CASES = 500;
/** TSVISOR_SEED, or another one each run; a failure tells it. */
const { seed } = new Random();

for (const target of targets) {
  test(`${target.name} holds against a hostile driver`, () => {
    fuzz(target, { seed: 1, cases: CASES });
    fuzz(target, { seed, cases: CASES });
  });

  test(`${target.name}: a case can be replayed`, () => {
    const once = replay(target, seed, 7);
    expect(once.length).toBeGreaterThan(3);
    expect(replay(target, seed, 7)).toEqual(once);
  });
}
