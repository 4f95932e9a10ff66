import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import { buildElf } from '../support/boot-images.js';
import { describeKvm } from '../support/kvm.js';

const MiB = 2 ** 20;
const seed = Number(process.env.TSVISOR_SEED ?? 20_240_601);

/** A small seeded generator (mulberry32): a failure is replayed with TSVISOR_SEED. */
function random(state: number): () => number {
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (t ^ (t >>> 14)) >>> 0;
  };
}

/** First bytes of what the assist completes: random operands after them reach its decoder and its memory accesses. */
const OPENINGS = [
  [0xcc],
  [0xcd],
  [0x9b],
  [0x0f, 0xae],
  [0x48, 0x0f, 0xae],
  [0x0f, 0xc7],
  [0x48, 0x0f, 0xc7],
  [0xf0, 0x48, 0x0f, 0xc7],
  [0x0f, 0x01],
  [0xf3, 0x0f, 0xb8],
  [0x0f, 0x38],
  [0x66, 0x0f, 0x38],
  [0xf2, 0x0f, 0x38],
  [0xc4, 0xe2],
  [0xc5],
  [0x62],
  [0x66, 0x0f, 0xd6],
  [0x66, 0x0f],
  [0xf3, 0x0f],
  [0xd9],
  [0xdb],
  [0xdd],
  [0x0f, 0x02],
  [0x0f, 0x03],
  [0x67, 0x0f, 0xae],
];

/** Code that starts with pointers into and out of RAM in the registers, then turns to noise. */
function noise(next: () => number): Uint8Array {
  const bytes: number[] = [];
  for (let register = 0; register < 8; register++) {
    if (register === 4) continue;
    const value = [0x200000, 0x3ffff8, 0xd0000000, 0xffffffffff600000, next() * 2 ** 20, 0xfffffffc][
      next() % 6
    ] as number;
    const view = new DataView(new ArrayBuffer(8));
    view.setBigUint64(0, BigInt.asUintN(64, BigInt(value)), true);
    bytes.push(0x48, 0xb8 + register, ...new Uint8Array(view.buffer));
  }
  while (bytes.length < 2000) {
    if (next() % 3 > 0) bytes.push(...(OPENINGS[next() % OPENINGS.length] as number[]));
    for (let n = next() % 6; n > 0; n--) bytes.push(next() & 0xff);
  }
  return Uint8Array.from(bytes);
}

describeKvm('guests that execute noise', () => {
  test(`end or are stopped, and never break their machine (seed ${seed})`, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
    const next = random(seed);
    const reasons = new Map<string, number>();
    try {
      for (let i = 0; i < 80; i++) {
        const kernel = join(folder, 'noise');
        writeFileSync(kernel, buildElf({ entry: MiB, segments: [{ paddr: MiB, data: noise(next) }] }));
        await using machine = await Machine.create({ kernel, memory: 4 * MiB, onReset: 'end' });
        machine.serial.resume();
        await machine.start();
        const timer = setTimeout(() => void machine.stop(), 150);
        // An error of tsvisor's own would reject here.
        const { reason } = await machine.wait();
        clearTimeout(timer);
        reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
      }
    } finally {
      rmSync(folder, { recursive: true });
    }
    expect([...reasons.values()].reduce((a, b) => a + b)).toBe(80);
    expect(reasons.size).toBeGreaterThan(1);
  });
});
