import { describe, expect, test } from 'vitest';
import { GuestMemory, GuestMemoryRangeError } from '#dist/memory/guest-memory.js';

const PAGE = 4096;
const HIGH = 4 * 1024 ** 3;

/** Two regions that touch at 2 pages, a hole, and one above 4 GiB. */
function memory() {
  const buffers = [new ArrayBuffer(2 * PAGE), new ArrayBuffer(PAGE), new ArrayBuffer(PAGE)] as const;
  const guest = new GuestMemory([
    { gpa: HIGH, buffer: buffers[2] },
    { gpa: 0, buffer: buffers[0] },
    { gpa: 2 * PAGE, buffer: buffers[1] },
  ]);
  const snapshot = () => buffers.map((b) => Buffer.from(b).toString('latin1')).join('');
  return { guest, snapshot };
}

const EDGE = 2 * PAGE;
const END = 3 * PAGE;

describe('GuestMemory', () => {
  test('knows its size and ranges, in address order', () => {
    const { guest } = memory();
    expect(guest.size).toBe(4 * PAGE);
    expect(guest.ranges).toEqual([
      { gpa: 0, size: 2 * PAGE },
      { gpa: 2 * PAGE, size: PAGE },
      { gpa: HIGH, size: PAGE },
    ]);
  });

  test('refuses no regions, overlapping regions and impossible addresses', () => {
    expect(() => new GuestMemory([])).toThrow(RangeError);
    const buffer = new ArrayBuffer(PAGE);
    for (const gpa of [0, 1, PAGE - 1]) {
      const regions = [
        { gpa: 0, buffer },
        { gpa, buffer },
      ];
      expect(() => new GuestMemory(regions)).toThrow(/overlap/);
    }
    for (const gpa of [-PAGE, Number.NaN, 0.5, 2 ** 53, Number.POSITIVE_INFINITY]) {
      expect(() => new GuestMemory([{ gpa, buffer }])).toThrow(RangeError);
    }
  });

  test('reads and writes across regions that touch', () => {
    const { guest } = memory();
    const data = Uint8Array.from({ length: 100 }, (_, i) => i + 1);
    guest.write(EDGE - 50, data);
    const back = new Uint8Array(100);
    guest.read(EDGE - 50, back);
    expect(back).toEqual(data);
    expect(guest.readU8(EDGE - 1)).toBe(50);
    expect(guest.readU8(EDGE)).toBe(51);
    guest.zero(EDGE - 1, 2);
    expect([guest.readU8(EDGE - 2), guest.readU8(EDGE - 1), guest.readU8(EDGE), guest.readU8(EDGE + 1)]).toEqual([
      49, 0, 0, 52,
    ]);
  });

  test('integers are little-endian, also across regions that touch', () => {
    const { guest } = memory();
    for (let back = 0; back <= 8; back++) {
      const at = EDGE - back;
      guest.writeU64(at, 0x8877_6655_4433_2211n);
      expect(guest.readU64(at)).toBe(0x8877_6655_4433_2211n);
      expect(guest.readU32(at)).toBe(0x4433_2211);
      expect(guest.readU32(at + 4)).toBe(0x8877_6655);
      expect(guest.readU16(at + 1)).toBe(0x3322);
      expect(guest.readU8(at + 7)).toBe(0x88);
      guest.writeU32(at, 0xdead_beef);
      guest.writeU16(at + 4, 0xcafe);
      guest.writeU8(at + 6, 0x7f);
      expect(guest.readU64(at)).toBe(0x887f_cafe_dead_beefn);
    }
  });

  test('integers at the first and last address of every region', () => {
    const { guest } = memory();
    for (const { gpa, size } of guest.ranges) {
      guest.writeU64(gpa, 1n);
      guest.writeU64(gpa + size - 8, 2n);
      expect([guest.readU64(gpa), guest.readU64(gpa + size - 8)]).toEqual([1n, 2n]);
    }
  });

  const outside = [END, END + 1, HIGH - 1, HIGH + PAGE, 2 ** 53 - 1, 2 ** 53, 2 ** 64, Number.POSITIVE_INFINITY];
  const nonsense = [-1, -PAGE, Number.NEGATIVE_INFINITY, Number.NaN, 0.5, 1.25, PAGE - 0.5];

  test.each([...outside, ...nonsense])('nothing can be read or written at %d', (gpa) => {
    const { guest, snapshot } = memory();
    const before = snapshot();
    const accesses = [
      () => guest.readU8(gpa),
      () => guest.readU16(gpa),
      () => guest.readU32(gpa),
      () => guest.readU64(gpa),
      () => guest.writeU8(gpa, 1),
      () => guest.writeU16(gpa, 1),
      () => guest.writeU32(gpa, 1),
      () => guest.writeU64(gpa, 1n),
      () => guest.slice(gpa, 1),
      () => guest.slice(gpa, 0),
      () => guest.read(gpa, new Uint8Array(1)),
      () => guest.write(gpa, Uint8Array.of(1)),
      () => guest.zero(gpa, 1),
    ];
    for (const access of accesses) expect(access, String(access)).toThrow(GuestMemoryRangeError);
    expect(guest.contains(gpa, 1)).toBe(false);
    expect(snapshot()).toBe(before);
  });

  test('an access that runs from RAM into a hole throws and changes nothing', () => {
    const { guest, snapshot } = memory();
    const before = snapshot();
    const writes = [
      () => guest.write(END - 1, Uint8Array.of(1, 2)),
      () => guest.write(EDGE - 1, new Uint8Array(PAGE + 2).fill(1)),
      () => guest.write(0, new Uint8Array(END + 1).fill(1)),
      () => guest.writeU16(END - 1, 0xffff),
      () => guest.writeU32(END - 3, 0xffff_ffff),
      () => guest.writeU64(END - 7, 0xffff_ffff_ffff_ffffn),
      () => guest.writeU64(HIGH + PAGE - 7, 0xffff_ffff_ffff_ffffn),
      () => guest.slice(END - 1, 2),
    ];
    for (const write of writes) expect(write, String(write)).toThrow(GuestMemoryRangeError);
    expect(() => guest.zero(0, HIGH + PAGE)).toThrow(GuestMemoryRangeError);
    expect(() => guest.readU32(END - 1)).toThrow(GuestMemoryRangeError);
    expect(() => guest.read(END - 1, new Uint8Array(2))).toThrow(GuestMemoryRangeError);
    expect(snapshot()).toBe(before);
  });

  test.each([-1, Number.NaN, 0.5, 2 ** 53, Number.POSITIVE_INFINITY])('%d is no length', (length) => {
    const { guest } = memory();
    expect(guest.contains(0, length)).toBe(false);
    expect(() => guest.slice(0, length)).toThrow(GuestMemoryRangeError);
    expect(() => guest.zero(0, length)).toThrow(GuestMemoryRangeError);
  });

  test('contains: touching regions count as one, holes do not', () => {
    const { guest } = memory();
    expect(guest.contains(0, END)).toBe(true);
    expect(guest.contains(0, END + 1)).toBe(false);
    expect(guest.contains(EDGE - 1, 2)).toBe(true);
    expect(guest.contains(END - 1, 2)).toBe(false);
    expect(guest.contains(HIGH - 1, 2)).toBe(false);
    expect(guest.contains(HIGH, PAGE)).toBe(true);
    expect(guest.contains(0, HIGH + PAGE)).toBe(false);
  });

  test('an empty access is valid where there is RAM, and nowhere else', () => {
    const { guest, snapshot } = memory();
    const before = snapshot();
    for (const gpa of [0, EDGE, END - 1, HIGH]) {
      expect(guest.contains(gpa, 0)).toBe(true);
      expect(guest.slice(gpa, 0)).toHaveLength(0);
      guest.read(gpa, new Uint8Array(0));
      guest.write(gpa, new Uint8Array(0));
      guest.zero(gpa, 0);
    }
    for (const gpa of [END, HIGH - 1, HIGH + PAGE]) {
      expect(guest.contains(gpa, 0)).toBe(false);
      expect(() => guest.write(gpa, new Uint8Array(0))).toThrow(GuestMemoryRangeError);
    }
    expect(snapshot()).toBe(before);
  });

  test('a slice is a live view of one region', () => {
    const { guest } = memory();
    const slice = guest.slice(HIGH + 16, 4);
    guest.writeU32(HIGH + 16, 0x0403_0201);
    expect(Array.from(slice)).toEqual([1, 2, 3, 4]);
    slice[0] = 9;
    expect(guest.readU8(HIGH + 16)).toBe(9);
    expect(() => guest.slice(EDGE - 1, 2)).toThrow(GuestMemoryRangeError);
  });

  test('that is revoked has no memory, whatever it had', () => {
    const { guest, snapshot } = memory();
    guest.writeU8(0, 1); // the region that it looks at first
    const before = snapshot();
    guest.revoke();
    for (const gpa of [0, EDGE, HIGH]) {
      expect(() => guest.writeU8(gpa, 2)).toThrow(GuestMemoryRangeError);
      expect(() => guest.read(gpa, new Uint8Array(64))).toThrow(GuestMemoryRangeError);
    }
    expect(guest.contains(0, 1)).toBe(false);
    expect(snapshot()).toBe(before);
  });

  test('the error names the range', () => {
    const { guest } = memory();
    expect(() => guest.zero(END, 16)).toThrow('no guest memory at 0x3000..0x3010');
  });
});
