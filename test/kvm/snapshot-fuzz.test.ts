import { expect, test } from 'vitest';
import { fuzzSnapshots } from '../fuzz/snapshot/fuzz.js';
import { describeKvm } from '../support/kvm.js';
import { Random } from './assist/random.js';

describeKvm('a crafted snapshot is refused, or is a machine that runs or ends', () => {
  for (const seed of [1, new Random().seed]) {
    test(`seed ${seed}`, async () => {
      const outcomes = await fuzzSnapshots({ seed, cases: 100 });
      expect(outcomes.ERR_SNAPSHOT).toBeGreaterThan(10);
      expect(outcomes.stopped).toBeGreaterThan(10);
    });
  }
});
