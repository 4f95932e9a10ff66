import { expect, test } from 'vitest';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { Segments } from '#dist/virtio/segments.js';

/** 256 bytes of RAM at 0, 256 that touch them and 256 after a gap; each byte its address, modulo 251. */
function setUp(...pieces: (readonly [gpa: number, length: number])[]) {
  const memory = new GuestMemory([0, 256, 1024].map((gpa) => ({ gpa, buffer: new ArrayBuffer(256) })));
  for (const { gpa, size } of memory.ranges) {
    memory.write(
      gpa,
      Uint8Array.from({ length: size }, (_, i) => (gpa + i) % 251),
    );
  }
  const segments = new Segments(memory);
  for (const [gpa, length] of pieces) segments.add(gpa, length);
  const addresses = pieces.flatMap(([gpa, length]) => Array.from({ length }, (_, i) => gpa + i));
  return { memory, segments, addresses };
}

const pieces = [
  [1030, 3],
  [250, 12],
  [5, 1],
  [1279, 1],
] as const;

test('are one run of bytes, whatever their pieces', () => {
  const { memory, segments, addresses } = setUp(...pieces);
  expect(segments.count).toBe(4);
  expect(segments.length).toBe(17);
  for (let offset = 0; offset <= 18; offset++) {
    for (let length = 0; length <= 18; length++) {
      const there = Math.max(0, Math.min(length, 17 - offset));
      const out = new Uint8Array(length).fill(0xee);
      expect(segments.read(offset, out)).toBe(there);
      const expected = addresses.slice(offset, offset + length).map((gpa) => gpa % 251);
      expect([...out]).toEqual([...expected, ...new Array(length - there).fill(0xee)]);

      const data = Uint8Array.from({ length }, (_, i) => 100 + i);
      expect(segments.write(offset, data)).toBe(there);
      const model = addresses.map((gpa, i) => (i >= offset && i < offset + there ? 100 + i - offset : gpa % 251));
      expect(addresses.map((gpa) => memory.readU8(gpa))).toEqual(model);
      for (const gpa of addresses) memory.writeU8(gpa, gpa % 251);
    }
  }
});

test('write and zero nothing else', () => {
  const { memory, segments, addresses } = setUp(...pieces);
  segments.write(0, new Uint8Array(100).fill(0xaa));
  segments.zero(0);
  for (const { gpa, size } of memory.ranges) {
    for (let at = gpa; at < gpa + size; at++) {
      expect(memory.readU8(at), `address ${at}`).toBe(addresses.includes(at) ? 0 : at % 251);
    }
  }
});

test('are zeroed from any offset on', () => {
  for (let offset = 0; offset <= 18; offset++) {
    const { memory, segments, addresses } = setUp(...pieces);
    segments.zero(offset);
    expect(addresses.map((gpa) => memory.readU8(gpa))).toEqual(addresses.map((gpa, i) => (i < offset ? gpa % 251 : 0)));
  }
});

test('are cut anywhere', () => {
  const { memory, segments, addresses } = setUp(...pieces);
  const part = new Segments(memory);
  for (let offset = 0; offset <= 18; offset++) {
    for (const length of [0, 1, 2, 3, 13, 17, 18, 2 ** 40]) {
      part.cut(segments, offset, length);
      const expected = addresses.slice(offset, offset + length);
      expect(part.length).toBe(expected.length);
      const covered: number[] = [];
      for (let i = 0; i < part.count; i++) {
        const [gpa, size] = part.pairs.subarray(2 * i, 2 * i + 2) as unknown as [number, number];
        expect(size).toBeGreaterThan(0);
        for (let n = 0; n < size; n++) covered.push(gpa + n);
      }
      expect(covered).toEqual(expected);
    }
  }
  expect(segments.length).toBe(17);
});

test('grow with their pieces and keep their room when they are cleared', () => {
  const { segments } = setUp();
  for (let i = 0; i < 100; i++) segments.add(i, 1);
  const { pairs } = segments;
  expect([...pairs.subarray(0, 200)]).toEqual(Array.from({ length: 100 }, (_, i) => [i, 1]).flat());
  segments.clear();
  expect([segments.count, segments.length]).toEqual([0, 0]);
  expect(segments.read(0, new Uint8Array(1))).toBe(0);
  for (let i = 0; i < 100; i++) segments.add(i, 2);
  expect(segments.pairs).toBe(pairs);
  expect(segments.length).toBe(200);
});
