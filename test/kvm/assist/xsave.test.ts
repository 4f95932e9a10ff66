import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, it } from 'vitest';
import { randomCase, type Spec } from './case.js';
import { describeCase, differences, toleranceFor } from './compare.js';
import { Executor, hasXsavec, WINDOW } from './executor.js';
import { Random } from './random.js';
import { xsaveSpecs } from './specs-xsave.js';
import { randomState } from './state.js';

const random = new Random();
const executor = new Executor();
afterAll(() => executor.close());

const CASES = Number(process.env.TSVISOR_CASES ?? 80);

function check(spec: Spec): void {
  for (let i = 0; i < CASES; i++) {
    const test = randomCase(spec, random, randomState(executor, random));
    const native = spec.loads ? executor.nativeLoad(test) : executor.native(test);
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
  for (const spec of xsaveSpecs(executor.xcr0, executor.hostOnly, hasXsavec)) it(spec.kind, () => check(spec));
});

describe('MXCSR where KVM keeps its state compacted', () => {
  it.runIf(/ xsaves( |$)/m.test(readFileSync('/proc/cpuinfo', 'latin1')))('is reset unless SSE is in use', () => {
    // KVM reports an old MXCSR for a guest that uses AVX but not SSE; the CPU has the reset value.
    const xsave = executor.guest.xsave();
    new DataView(xsave.buffer).setUint32(24, 0x3f80, true);
    new DataView(xsave.buffer).setBigUint64(512, 4n, true);
    const gprs = Array.from({ length: 16 }, () => BigInt(WINDOW.start));
    const code = Uint8Array.of(0x0f, 0xae, 0x1f); // stmxcsr [rdi]
    const test = { code, gprs, rflags: 2n, memory: new Uint8Array(WINDOW.length), xsave };
    const stored = [executor.native(test), executor.completed(test, 3)].map((result) =>
      new DataView(result.memory.buffer).getUint32(0, true).toString(16),
    );
    expect(stored).toEqual(['1f80', '1f80']);
  });
});
