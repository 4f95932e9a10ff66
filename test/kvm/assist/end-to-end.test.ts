import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, it } from 'vitest';
import { bare } from '../../support/bare-guest-layout.js';
import { randomCase, type Spec } from './case.js';
import { describeCase, differences, toleranceFor } from './compare.js';
import { type Case, Executor, hasXsavec, WINDOW } from './executor.js';
import { Random } from './random.js';
import { generalSpecs, immediateSpecs } from './specs-general.js';
import { sseSpecs } from './specs-sse.js';
import { xsaveSpecs } from './specs-xsave.js';
import { randomState } from './state.js';

// Guest kernel mode as the machine runs it: KVM first, the assist where KVM gives up. On ordinary KVM this compares the CPU
// with itself; where KVM interprets, every instruction that it leaves must come to the assist.

const random = new Random();
const executor = new Executor();
afterAll(() => executor.close());

/**
 * What KVM's emulator runs itself (Linux, arch/x86/kvm/emulate.c), TZCNT and LZCNT wrongly, as BSF and BSR. MOVBE is #UD
 * there while KVM offers the guest none. They never come to the assist.
 */
const NOT_LEFT = /^(tzcnt|lzcnt|movbe|ud2|movups|movaps|movntps|movdqa|movdqu|movntdq|nop|endbr64|cld|push)$/;

const xsave = xsaveSpecs(executor.xcr0, executor.hostOnly, hasXsavec);
const specs = [...generalSpecs, ...immediateSpecs, ...sseSpecs, ...xsave].filter(
  (spec) => !spec.userOnly && !NOT_LEFT.test(spec.kind),
);

function check(spec: Spec): void {
  for (let i = 0; i < 6; i++) {
    const test = randomCase(spec, random, randomState(executor, random));
    if (test.place === 'supervisor') continue;
    const native = spec.loads && executor.interpreted ? executor.nativeLoad(test) : executor.native(test);
    const kernel = executor.kernel(test);
    const why = `${spec.kind}: ${describeCase(test, random.seed)}`;
    // KVM reads the operand of CMPXCHG16B, as if it were CMPXCHG8B, before it finds that it cannot do it.
    const beforehand = spec.kind === 'cmpxchg16b' && kernel.outcome.kind === 'fault';
    if (executor.interpreted && beforehand) continue;
    if (executor.interpreted) expect(kernel.kind, why).toBe(spec.kind);
    else expect(kernel.kind, why).toBeUndefined();
    const tolerance = { ...toleranceFor(spec, true, executor.interpreted), ignore: [[6, 24]] as const, cr2Page: true };
    expect(differences(native, kernel, tolerance), why).toEqual([]);
  }
}

describe('in guest kernel mode', () => {
  for (const spec of specs) {
    it(`${spec.kind} ${spec.opcode.map((byte) => byte.toString(16)).join(' ')}`, () => check(spec));
  }
});

const DOUBLE = [0xc5, 0xc5, 0xfe, 0xff]; // vpaddd ymm7, ymm7, ymm7
const STORE = [0xc5, 0xfe, 0x7f, 0x3f]; // vmovdqu [rdi], ymm7
const addUp = (times: number) => [0xc5, 0xfe, 0x6f, 0x3f, ...Array(times).fill(DOUBLE).flat()]; // vmovdqu ymm7, [rdi]

describe('two processes that compute with AVX', () => {
  const cpuinfo = readFileSync('/proc/cpuinfo', 'latin1');
  const avx = (executor.xcr0 & 4n) !== 0n;
  const families: [save: string, restore: string, has: boolean, code: (reg: number) => number[]][] = [
    ['xsave', 'xrstor', avx, (restore) => [0x48, 0x0f, 0xae, restore ? 0x2f : 0x27]],
    ['xsaves', 'xrstors', avx && / xsaves( |$)/m.test(cpuinfo), (restore) => [0x48, 0x0f, 0xc7, restore ? 0x1f : 0x2f]],
  ];
  for (const [save, restore, has, code] of families) {
    it.runIf(has)(`keep their YMM registers when their kernel switches with ${save} and ${restore}`, () => {
      const [first, second] = [bare.data + 0x2000, bare.data + 0x3000].map(BigInt) as [bigint, bigint];
      let memory = new Uint8Array(WINDOW.length);
      const u32 = (at: number) => new DataView(memory.buffer, memory.byteOffset + at, 4);
      const compacted = save === 'xsaves' ? (1n << 63n) | executor.xcr0 : 0n;
      // A process starts from an empty area.
      new DataView(memory.buffer).setBigUint64(Number(second) - WINDOW.start + 520, compacted, true);
      for (let lane = 0; lane < 8; lane++) {
        u32(lane * 4).setUint32(0, lane + 1, true);
        u32(32 + lane * 4).setUint32(0, 100 - lane, true);
      }
      let xsave = executor.guest.xsave();
      const run = (mode: 'user' | 'kernel', bytes: readonly number[], rdi: bigint) => {
        const gprs = Array.from({ length: 16 }, () => 0n);
        gprs[0] = 0xffff_ffffn;
        gprs[2] = 0xffff_ffffn;
        gprs[4] = BigInt(bare.kernelStackTop);
        gprs[7] = rdi;
        const test: Case = { code: Uint8Array.from(bytes), gprs, rflags: 2n, memory, xsave };
        const result = mode === 'user' ? executor.native(test) : executor.kernel(test);
        expect(result.outcome.kind).toBe('done');
        memory = Uint8Array.from(result.memory);
        xsave = executor.guest.xsave();
        return result.kind;
      };
      const switchTo = (from: bigint, to: bigint) => {
        const kinds = [run('kernel', code(0), from), run('kernel', code(1), to)];
        if (executor.interpreted) expect(kinds).toEqual([save, restore]);
      };
      run('user', addUp(1), BigInt(bare.data)); // the first process: 2 × (lane + 1)
      switchTo(first, second);
      run('user', addUp(2), BigInt(bare.data + 32)); // the second: 4 × (100 - lane)
      switchTo(second, first);
      run('user', DOUBLE, 0n); // the first goes on: 4 × (lane + 1)
      switchTo(first, second);
      run('user', STORE, BigInt(bare.data + 0x1000));
      switchTo(second, first);
      run('user', STORE, BigInt(bare.data + 0x1020));
      const lanes = Array.from({ length: 16 }, (_, i) => u32(0x1000 + i * 4).getUint32(0, true));
      expect(lanes).toEqual(Array.from({ length: 16 }, (_, i) => (i < 8 ? 4 * (100 - i) : 4 * (i - 7))));
    });
  }
});
