import { afterAll, describe, expect, it } from 'vitest';
import { randomCase, type Spec } from './case.js';
import { describeCase, differences, toleranceFor } from './compare.js';
import { Executor } from './executor.js';
import { Random } from './random.js';
import { generalSpecs, immediateSpecs } from './specs-general.js';
import { sseSpecs } from './specs-sse.js';
import { randomState } from './state.js';

// Every instruction here is one that user mode may run: it runs natively at CPL 3, where no KVM interprets it, and is then
// completed from the same state, at CPL 3 for an exact comparison and at CPL 0 as in use.

const random = new Random();
const executor = new Executor();
afterAll(() => executor.close());

/** Cases an instruction; TSVISOR_CASES for a longer search. */
const CASES = Number(process.env.TSVISOR_CASES ?? 20);

/** Bytes of the x87 pointers, which CPUs record in more than one way (SDM 1 8.1.8, AMD APM 2 11.5.5). */
const X87_POINTERS = [6, 24] as const;

function check(spec: Spec): void {
  for (let i = 0; i < CASES; i++) {
    const test = randomCase(spec, random, randomState(executor, random));
    const native = executor.native(test);
    for (const cpl of [3, 0] as const) {
      if (cpl === 0 && (spec.userOnly || test.place === 'supervisor')) continue;
      const completed = executor.completed(test, cpl);
      const tolerance = { ...toleranceFor(spec, cpl === 0, executor.interpreted), ignore: [X87_POINTERS] };
      const found = differences(native, completed, tolerance);
      expect(found, `${spec.kind} at CPL ${cpl}: ${describeCase(test, random.seed)}`).toEqual([]);
      expect(completed.kind).toBe(spec.kind);
    }
  }
}

const name = (spec: Spec) =>
  [spec.kind, ...spec.opcode.map((byte) => byte.toString(16)), spec.prefix?.toString(16)].join(' ');

describe('completed as the CPU does it natively', () => {
  for (const spec of [...generalSpecs, ...immediateSpecs, ...sseSpecs]) it(name(spec), () => check(spec));
});
