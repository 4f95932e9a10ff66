import { describe, expect, test } from 'vitest';
import { Bus, type BusDevice } from '#dist/bus/bus.js';

/** Records accesses as `r|w offset length`; reads fill with the offset. */
class Probe implements BusDevice {
  readonly name: string;
  readonly log: string[] = [];

  constructor(name: string) {
    this.name = name;
  }

  read(offset: number, data: Uint8Array): void {
    this.log.push(`r${offset}+${data.length}`);
    data.fill(offset);
  }

  write(offset: number, data: Uint8Array): void {
    this.log.push(`w${offset}+${data.length}=${Array.from(data).join(',')}`);
  }
}

describe('Bus', () => {
  test('gives a device offsets from its base', () => {
    const bus = new Bus('port');
    const probe = new Probe('a');
    bus.add(0x3f8, 8, probe);
    const data = new Uint8Array(1);
    expect(bus.read(0x3fd, data)).toBe(true);
    expect(data[0]).toBe(5);
    expect(bus.write(0x3ff, Uint8Array.of(9))).toBe(true);
    expect(probe.log).toEqual(['r5+1', 'w7+1=9']);
  });

  test('unmapped reads are all ones whatever the buffer held; unmapped writes are dropped', () => {
    const bus = new Bus('port');
    bus.add(0x10, 4, new Probe('a'));
    for (const length of [1, 2, 4, 8]) {
      const data = new Uint8Array(length);
      expect(bus.read(0x20, data)).toBe(false);
      expect(Array.from(data)).toEqual(new Array(length).fill(0xff));
      expect(bus.write(0x20, data)).toBe(false);
    }
  });

  test('a device that leaves a read alone answers with all ones', () => {
    const bus = new Bus('port');
    bus.add(0, 1, { name: 'silent', read: () => {}, write: () => {} });
    const data = Uint8Array.of(0);
    expect(bus.read(0, data)).toBe(true);
    expect(data[0]).toBe(0xff);
  });

  test.each([
    ['the same range', 0x100, 8],
    ['one byte at its start', 0x100, 1],
    ['one byte at its end', 0x107, 1],
    ['a range that ends in it', 0xfc, 5],
    ['a range that starts in it', 0x107, 100],
    ['a range around it', 0, 0x1000],
    ['a range inside it', 0x102, 2],
  ])('refuses %s, naming both devices', (_, base, length) => {
    const bus = new Bus('port');
    bus.add(0x100, 8, new Probe('first'));
    expect(() => bus.add(base, length, new Probe('second'))).toThrow(/port range 0x.* of second overlaps first/);
    expect(bus.ranges).toHaveLength(1);
  });

  test.each([
    [0, 0],
    [0, -1],
    [-1, 2],
    [Number.NaN, 1],
    [0, Number.NaN],
    [0.5, 1],
    [2 ** 53, 1],
    [0, Number.POSITIVE_INFINITY],
  ])('refuses %d+%d as not a range', (base, length) => {
    expect(() => new Bus('MMIO').add(base, length, new Probe('x'))).toThrow(/MMIO range .* of x is not a range/);
  });

  test('ranges may touch, and are sorted whatever the order they came in', () => {
    const bus = new Bus('MMIO');
    const probes = new Map([5, 1, 3, 4, 0, 2].map((i) => [i, new Probe(`p${i}`)]));
    for (const [i, probe] of probes) bus.add(i * 0x1000, 0x1000, probe);
    expect(bus.ranges.map((r) => r.base)).toEqual([0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000]);
    for (const [i, probe] of probes) {
      expect(bus.write(i * 0x1000, Uint8Array.of(1))).toBe(true);
      expect(bus.write(i * 0x1000 + 0xffe, Uint8Array.of(2, 3))).toBe(true);
      expect(probe.log).toEqual(['w0+1=1', 'w4094+2=2,3']);
    }
  });

  test('an access past the end of a device hits nothing, even if the next device touches', () => {
    const bus = new Bus('port');
    const [a, b] = [new Probe('a'), new Probe('b')];
    bus.add(0x10, 4, a);
    bus.add(0x14, 4, b);
    const data = new Uint8Array(4);
    bus.read(0x10, data); // warms the cache of the last range
    a.log.length = 0;
    expect(bus.read(0x11, data)).toBe(false);
    expect(Array.from(data)).toEqual([255, 255, 255, 255]);
    expect(bus.write(0x13, new Uint8Array(2))).toBe(false);
    expect(bus.read(0x0f, new Uint8Array(2))).toBe(false);
    expect([a.log, b.log]).toEqual([[], []]);
  });

  test('addresses between ranges and beyond all of them hit nothing', () => {
    const bus = new Bus('MMIO');
    for (let i = 0; i < 100; i++) bus.add(i * 10, 5, new Probe(`p${i}`));
    for (let address = 0; address < 1010; address++) {
      expect(bus.write(address, Uint8Array.of(0)), `${address}`).toBe(address < 1000 && address % 10 < 5);
    }
    expect(bus.write(2 ** 52, Uint8Array.of(0))).toBe(false);
  });
});
