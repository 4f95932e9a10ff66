import { afterAll, describe, expect, it } from 'vitest';
import { randomCase, type Spec } from './case.js';
import { describeCase, differences, toleranceFor } from './compare.js';
import { Executor, hasXsavec } from './executor.js';
import { Random } from './random.js';
import { xsaveSpecs } from './specs-xsave.js';
import { randomState } from './state.js';

const random = new Random();
const executor = new Executor();
afterAll(() => executor.close());

const CASES = 150;

function check(spec: Spec): void {
  for (let i = 0; i < CASES; i++) {
    const test = randomCase(spec, random, randomState(executor, random));
    const native = executor.native(test);
    for (const cpl of [3, 0] as const) {
      if (cpl === 0 && test.place === 'supervisor') continue;
      const completed = executor.completed(test, cpl);
      const found = differences(native, completed, {
        ...toleranceFor(spec, cpl === 0, executor.interpreted),
        cr2Page: true,
      });
      expect(found, `${spec.kind} at CPL ${cpl}: ${describeCase(test, random.seed)}`).toEqual([]);
      expect(completed.kind).toBe(spec.kind);
    }
  }
}

describe('the XSAVE family, completed as the CPU does it natively', () => {
  for (const spec of xsaveSpecs(executor.xcr0, hasXsavec)) it(spec.kind, () => check(spec));
});
