import { describe, expect, test } from 'vitest';
import {
  eisaId,
  integer,
  interrupt,
  ioPorts,
  memory32,
  method,
  name,
  notify,
  packaged,
  packageOf,
  resourceTemplate,
  scope,
  string,
} from '#dist/arch/x86_64/acpi/aml.js';
import { AmlReader, readResources } from './read-tables.js';

const read = (...aml: (readonly number[])[]) => new AmlReader(Uint8Array.from(aml.flat()));

describe('PkgLength', () => {
  // The content's length, and the bytes that the length itself takes: they count too.
  const boundaries = [
    [0, 1],
    [1, 1],
    [62, 1],
    [63, 2],
    [64, 2],
    [4093, 2],
    [4094, 3],
    [4095, 3],
    [2 ** 20 - 4, 3],
    [2 ** 20 - 3, 4],
    [2 ** 20, 4],
  ] as const;

  test.each(boundaries)('%i bytes need %i more', (length, size) => {
    const content = new Array<number>(length).fill(0xa5);
    const bytes = packaged(content);
    expect(bytes.length).toBe(length + size);
    expect(read(bytes).packageEnd()).toBe(length + size);
    expect(bytes.slice(size).every((byte) => byte === 0xa5)).toBe(true);
  });

  test('by hand', () => {
    expect(packaged([])).toEqual([1]);
    expect(packaged(new Array(62).fill(0))[0]).toBe(63);
    expect(packaged(new Array(63).fill(0)).slice(0, 2)).toEqual([0x41, 0x04]); // 65
    expect(packaged(new Array(4094).fill(0)).slice(0, 3)).toEqual([0x81, 0x00, 0x01]); // 4097
  });

  test('more than 28 bits are refused', () => {
    const endless = { length: 2 ** 28 - 4 } as readonly number[];
    expect(() => packaged(endless)).toThrow(RangeError);
  });
});

test('integers take as few bytes as they need', () => {
  const cases = [
    [0, 1],
    [1, 1],
    [2, 2],
    [0xff, 2],
    [0x100, 3],
    [0xffff, 3],
    [0x10000, 5],
    [0xffff_ffff, 5],
  ] as const;
  for (const [value, size] of cases) {
    expect(integer(value).length).toBe(size);
    expect(read(integer(value)).value()).toBe(value);
  }
  for (const value of [-1, 0.5, 2 ** 32, Number.NaN]) expect(() => integer(value)).toThrow(RangeError);
});

test('strings, packages and EISA IDs', () => {
  expect(read(string('LNRO0005')).value()).toBe('LNRO0005');
  expect(read(packageOf(integer(5), integer(0), string('x'))).value()).toEqual([5, 0, 'x']);
  // The specification's own example, section 19.6.36 (EISAID): PNP0C09 is 0x090CD041.
  expect(read(eisaId('PNP0C09')).value()).toBe(0x090cd041);
});

test('names and scopes, of the root and relative', () => {
  const aml = scope('\\_SB_', name('_UID', integer(7)), name('\\_S5_', integer(1)));
  expect(read(aml).terms()).toEqual([
    {
      kind: 'scope',
      path: '\\_SB_',
      terms: [
        { kind: 'name', path: '_UID', value: 7 },
        { kind: 'name', path: '\\_S5_', value: 1 },
      ],
    },
  ]);
});

test('methods that notify', () => {
  expect(read(method('_EVT', 1, notify('VGEN', 0x80), notify('VGEN', 1))).terms()).toEqual([
    {
      kind: 'method',
      path: '_EVT',
      flags: 0b1001, // one argument, serialized
      notifications: [
        { path: 'VGEN', value: 0x80 },
        { path: 'VGEN', value: 1 },
      ],
    },
  ]);
});

describe('resource descriptors', () => {
  const resources = (...descriptors: (readonly number[])[]) =>
    readResources(read(resourceTemplate(...descriptors)).value() as Uint8Array);

  test('hold their values up to the largest', () => {
    expect(resources(memory32(0xffff_f000, 0x1000), memory32(0, 0xffff_ffff))).toEqual([
      { kind: 'memory', writable: true, base: 0xffff_f000, length: 0x1000 },
      { kind: 'memory', writable: true, base: 0, length: 0xffff_ffff },
    ]);
    expect(resources(ioPorts(0xff00, 255))).toEqual([
      { kind: 'io', decode: 16, min: 0xff00, max: 0xff00, length: 255 },
    ]);
    const flags = { kind: 'interrupt', consumer: true, polarity: 'high' };
    expect(resources(interrupt(0xffff_ffff, 'level'), interrupt(4, 'edge'))).toEqual([
      { ...flags, trigger: 'level', sharing: 'shared', gsis: [0xffff_ffff] },
      { ...flags, trigger: 'edge', sharing: 'exclusive', gsis: [4] },
    ]);
    expect(resources()).toEqual([]);
  });

  test('refuse what they cannot hold', () => {
    expect(() => memory32(2 ** 32, 1)).toThrow(RangeError);
    expect(() => memory32(0, 2 ** 32)).toThrow(RangeError);
    expect(() => ioPorts(2 ** 16, 1)).toThrow(RangeError);
    expect(() => ioPorts(0, 256)).toThrow(RangeError);
    expect(() => interrupt(-1, 'level')).toThrow(RangeError);
  });
});
