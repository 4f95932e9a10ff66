import { describe, expect, test } from 'vitest';
import { CmosRtc } from '#dist/devices/cmos-rtc.js';
import { StateReader } from '#dist/state-reader.js';
import { random } from './serial-rig.js';

const [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY] = [0, 2, 4, 6, 7, 8, 9, 0x32];
const [A, B, C, D] = [10, 11, 12, 13];
const [SET, BINARY, HOURS_24] = [0x80, 0x04, 0x02];
const MiB = 1024 ** 2;

class Rig {
  time: number;
  readonly rtc: CmosRtc;

  constructor(time: string, memoryBelow4GiB = 256 * MiB, memoryAbove4GiB?: number) {
    this.time = Date.parse(time);
    this.rtc = new CmosRtc({ clock: { now: () => this.time }, memoryBelow4GiB, memoryAbove4GiB });
  }

  read(index: number): number {
    this.rtc.writeByte(0, index);
    return this.rtc.readByte(1);
  }

  write(index: number, value: number): void {
    this.rtc.writeByte(0, index);
    this.rtc.writeByte(1, value);
  }

  get all(): number[] {
    return [CENTURY, YEAR, MONTH, DAY, DAY_OF_WEEK, HOURS, MINUTES, SECONDS].map((i) => this.read(i));
  }

  /** Linux's mc146818_get_time() in drivers/rtc/rtc-mc146818-lib.c, with ACPI's century register: an ISO time. */
  linuxGetTime(accessMs = 0): string {
    const read = (index: number) => {
      this.time += accessMs;
      return this.read(index);
    };
    for (let attempt = 0; attempt < 100; attempt++) {
      const seconds = read(SECONDS);
      if (read(A) & 0x80) {
        this.time += 0.1;
        continue;
      }
      if (seconds !== read(SECONDS)) continue;
      const raw = [seconds, ...[MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY].map(read)];
      const binary = (read(B) & BINARY) !== 0;
      if (read(A) & 0x80 || seconds !== read(SECONDS)) continue;
      const [s = 0, m = 0, h = 0, d = 0, month = 0, year = 0, century = 0] = raw.map((v) =>
        binary ? v : (v >> 4) * 10 + (v & 15),
      );
      return new Date(Date.UTC(century * 100 + year, month - 1, d, h, m, s)).toISOString();
    }
    throw new Error('UIP is stuck');
  }

  /** mc146818_set_time(), on Intel: with the divider held in reset. */
  linuxSetTime(iso: string, resetDivider = true): void {
    const date = new Date(iso);
    const bcd = (v: number) => Math.trunc(v / 10) * 16 + (v % 10);
    const [a, b] = [this.read(A) & 0x7f, this.read(B)];
    this.write(B, b | SET);
    if (resetDivider) this.write(A, a | 0x70);
    this.write(YEAR, bcd(date.getUTCFullYear() % 100));
    this.write(MONTH, bcd(date.getUTCMonth() + 1));
    this.write(DAY, bcd(date.getUTCDate()));
    this.write(HOURS, bcd(date.getUTCHours()));
    this.write(MINUTES, bcd(date.getUTCMinutes()));
    this.write(SECONDS, bcd(date.getUTCSeconds()));
    this.write(CENTURY, bcd(Math.trunc(date.getUTCFullYear() / 100)));
    this.write(B, b);
    if (resetDivider) this.write(A, a);
  }
}

describe('CmosRtc time', () => {
  test('BCD and 24 hours after power-on', () => {
    const rig = new Rig('2031-12-28T23:59:58Z'); // a Sunday
    expect(rig.all).toEqual([0x20, 0x31, 0x12, 0x28, 0x01, 0x23, 0x59, 0x58]);
    rig.time += 2000;
    expect(rig.all).toEqual([0x20, 0x31, 0x12, 0x29, 0x02, 0x00, 0x00, 0x00]);
  });

  test('binary', () => {
    const rig = new Rig('2031-12-28T23:59:58Z');
    rig.write(B, BINARY | HOURS_24);
    expect(rig.all).toEqual([20, 31, 12, 28, 1, 23, 59, 58]);
  });

  test.each([
    [0, 0x12],
    [1, 0x01],
    [11, 0x11],
    [12, 0x92],
    [13, 0x81],
    [23, 0x91],
  ])('12 hours: %d o’clock reads %i, and is written the same way', (hour, register) => {
    const rig = new Rig('2026-05-05T00:00:00Z');
    rig.time += hour * 3_600_000;
    rig.write(B, 0);
    expect(rig.read(HOURS)).toBe(register);
    rig.write(B, BINARY);
    expect(rig.read(HOURS)).toBe((hour % 12 || 12) | (hour >= 12 ? 0x80 : 0));
    rig.write(B, SET);
    rig.write(HOURS, register);
    rig.write(B, 0);
    rig.write(B, HOURS_24 | BINARY);
    expect(rig.read(HOURS)).toBe(hour);
  });

  test.each([
    '1970-01-01T00:00:00.000Z',
    '1999-12-31T23:59:59.000Z',
    '2024-02-29T12:00:00.000Z',
    '2100-03-01T00:00:00.000Z',
  ])('Linux reads %s', (iso) => {
    const rig = new Rig(iso);
    expect(rig.linuxGetTime()).toBe(iso);
    rig.write(B, BINARY | HOURS_24);
    expect(rig.linuxGetTime()).toBe(iso);
  });

  test('Linux reads the time whenever it comes, also slowly: UIP is never stuck', () => {
    for (let offset = 0; offset < 2000; offset += 7) {
      const rig = new Rig('2026-12-31T23:59:58Z');
      rig.time += offset;
      const before = rig.time;
      const got = Date.parse(rig.linuxGetTime(0.15));
      expect(got).toBeGreaterThanOrEqual(Math.floor(before / 1000) * 1000);
      expect(got).toBeLessThanOrEqual(rig.time);
      expect(rig.time - before).toBeLessThan(10);
    }
  });

  test('UIP is up for the last 2 ms of each second, and cannot be written', () => {
    const rig = new Rig('2026-01-01T00:00:00Z');
    const start = rig.time;
    rig.write(A, 0xa6);
    for (const [ms, uip] of [
      [0, 0],
      [500, 0],
      [997, 0],
      [998, 0x80],
      [999, 0x80],
      [1000, 0],
      [1999, 0x80],
    ] as const) {
      rig.time = start + ms;
      expect(rig.read(A)).toBe(0x26 | uip);
    }
    rig.write(B, SET | HOURS_24);
    expect(rig.read(A)).toBe(0x26);
  });

  test('SET freezes the time registers', () => {
    const rig = new Rig('2026-01-01T00:00:00Z');
    rig.write(B, SET | HOURS_24);
    const frozen = rig.all;
    rig.time += 10_000;
    expect(rig.all).toEqual(frozen);
  });

  test('a time that Linux sets is kept, and goes on from there', () => {
    for (const resetDivider of [true, false]) {
      const rig = new Rig('2026-01-01T00:00:00.250Z');
      rig.linuxSetTime('2042-07-08T09:10:11Z', resetDivider);
      expect(rig.linuxGetTime()).toBe('2042-07-08T09:10:11.000Z');
      // The next second comes half a second after a reset of the divider, else in the old phase.
      rig.time += resetDivider ? 499 : 749;
      expect(rig.read(SECONDS)).toBe(0x11);
      rig.time += 1;
      expect(rig.read(SECONDS)).toBe(0x12);
      rig.time += 86_400_000;
      expect(rig.linuxGetTime()).toBe('2042-07-09T09:10:12.000Z');
    }
  });

  test('a time register written without SET counts at once, the others go on', () => {
    const rig = new Rig('2026-01-01T10:20:30.400Z');
    rig.write(MINUTES, 0x45);
    expect(rig.linuxGetTime()).toBe('2026-01-01T10:45:30.000Z');
    rig.time += 600;
    expect(rig.read(SECONDS)).toBe(0x31);
  });

  test('nonsense makes some time and no harm', () => {
    const rig = new Rig('2026-01-01T00:00:00Z');
    for (const value of [0x00, 0xff, 0x9a]) {
      rig.write(B, SET);
      for (const index of [SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY]) rig.write(index, value);
      rig.write(B, HOURS_24);
      const all = rig.all;
      for (const byte of all) expect(byte & 0x0f).toBeLessThan(10);
      rig.time += 1000;
      expect(rig.all).not.toEqual(all);
    }
  });
});

describe('CmosRtc memory', () => {
  test('128 bytes behind 7 bits of index; bit 7 masks NMI only; the index reads as all ones', () => {
    const rig = new Rig('2026-01-01T00:00:00Z');
    for (let i = 14; i < 128; i++) if (i !== CENTURY) rig.write(i, i ^ 0x55);
    for (let i = 14; i < 128; i++) if (i !== CENTURY) expect(rig.read(i | 0x80)).toBe(i ^ 0x55);
    expect(rig.rtc.readByte(0)).toBe(0xff);
    expect(rig.rtc.readByte(2)).toBe(0xff);
    for (const alarm of [1, 3, 5]) {
      rig.write(alarm, 0xc0);
      expect(rig.read(alarm)).toBe(0xc0);
    }
  });

  test('a two-byte write sets index and data', () => {
    const rig = new Rig('2026-01-01T00:00:00Z');
    rig.rtc.write(0, Uint8Array.of(0x0f, 0x0a));
    expect(rig.read(0x0f)).toBe(0x0a);
  });

  test('register C shows an update once, D that the battery is good; neither can be written', () => {
    const rig = new Rig('2026-01-01T00:00:00Z');
    rig.write(C, 0xff);
    rig.write(D, 0x00);
    expect([rig.read(C), rig.read(D)]).toEqual([0, 0x80]);
    rig.time += 1000;
    expect([rig.read(C), rig.read(C)]).toEqual([0x10, 0]);
    rig.write(B, HOURS_24 | 0x10);
    rig.time += 1000;
    expect([rig.read(C), rig.read(C)]).toEqual([0x90, 0]);
  });

  test.each([
    [32 * MiB, 0, 640, 31 * 1024, 256, 0],
    [16 * MiB, 0, 640, 15 * 1024, 0, 0],
    [256 * MiB, 0, 640, 0xffff, 240 * 16, 0],
    [3072 * MiB, 5120 * MiB, 640, 0xffff, 3056 * 16, 5120 * 16],
    [0, 0, 0, 0, 0, 0],
  ])('sizes for %d bytes below and %d above 4 GiB', (below, above, base, extended, above16MiB, high) => {
    const rig = new Rig('2026-01-01T00:00:00Z', below, above);
    const word = (index: number) => rig.read(index) | (rig.read(index + 1) << 8);
    expect([word(0x15), word(0x17), word(0x30), word(0x34)]).toEqual([base, extended, extended, above16MiB]);
    expect(word(0x5b) | (rig.read(0x5d) << 16)).toBe(high);
  });
});

describe('CmosRtc state', () => {
  test('save and restore carry memory, a set time and a halted clock, as plain data', () => {
    const rig = new Rig('2026-01-01T00:00:00.100Z');
    rig.linuxSetTime('2042-07-08T09:10:11Z');
    rig.write(0x40, 0x99);
    for (const halted of [false, true]) {
      if (halted) rig.write(B, SET | HOURS_24);
      const state = JSON.parse(JSON.stringify(rig.rtc.save()));
      const other = new Rig('2026-01-01T00:00:00.100Z');
      other.rtc.restore(new StateReader(state, 'cmos'));
      expect(other.rtc.save()).toEqual(state);
      other.time += 60_000;
      other.write(B, HOURS_24);
      expect(other.linuxGetTime()).toBe(halted ? '2042-07-08T09:10:11.000Z' : '2042-07-08T09:11:11.000Z');
      expect(other.read(0x40)).toBe(0x99);
    }
  });

  test('random accesses never throw', () => {
    const next = random(11);
    const rig = new Rig('2026-01-01T00:00:00Z');
    const data = new Uint8Array(8);
    for (let i = 0; i < 100_000; i++) {
      const window = data.subarray(0, 1 << (next() & 3));
      const offset = next() % 3;
      if (next() & 1) rig.rtc.read(offset, window);
      else
        rig.rtc.write(
          offset,
          window.map(() => next()),
        );
      rig.time += next() % 3000;
      if (i % 100 === 0 && !Number.isFinite(rig.rtc.save().offsetMs)) throw new Error(`time lost after ${i}`);
    }
  });
});
