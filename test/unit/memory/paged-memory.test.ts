import { expect, it } from 'vitest';
import { PagedMemory } from '#dist/memory/paged-memory.js';

it('what is read is only given when it is what the guest wrote', () => {
  let lost = false;
  const memory = new PagedMemory([{ gpa: 0x1000, buffer: new ArrayBuffer(0x2000) }], () => {
    if (lost) throw new Error('lost');
  });
  const reads: (() => unknown)[] = [
    () => memory.readU8(0x1000),
    () => memory.readU16(0x1fff),
    () => memory.readU32(0x1000),
    () => memory.readU64(0x1ffc),
    () => memory.read(0x1000, new Uint8Array(8)),
    () => memory.read(0x1000, new Uint8Array(0x2000)),
    () => memory.slice(0x1800, 0x1000),
  ];
  memory.writeU32(0x1ffe, 0x0403_0201);
  expect(memory.readU32(0x1ffe)).toBe(0x0403_0201);
  expect([...memory.slice(0x1ffe, 4)]).toEqual([1, 2, 3, 4]);
  for (const read of reads) expect(read).not.toThrow();
  lost = true;
  for (const read of reads) expect(read).toThrow('lost');
  memory.writeU64(0x1000, 1n); // harms nobody
});
