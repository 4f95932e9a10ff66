import { describe, expect, test } from 'vitest';
import { bytesToState, StateReader } from '#dist/state-reader.js';
import type { Json } from '../../support/snapshot/folder.js';

const reader = (fields: Json) => new StateReader(fields, 'devices.x');

function refuses(read: () => unknown, message: string): void {
  expect(read).toThrowError(expect.objectContaining({ code: 'ERR_SNAPSHOT' }));
  expect(read).toThrowError(message);
}

/** Nothing of these is a number, text, … of the kind that is asked for. */
const OTHERS: Json[] = [
  undefined,
  null,
  true,
  0.5,
  Number.NaN,
  -1,
  257,
  '',
  'text',
  [],
  ['a'],
  [1, 2, 3],
  {},
  { a: 1 },
];

describe('what is not as it should be is refused by its path', () => {
  const path = 'snapshot: devices.x.f';
  const kinds: Record<string, { read: (state: StateReader) => unknown; good: Json[] }> = {
    number: { read: (s) => s.number('f', 0, 256), good: [0, 256] },
    boolean: { read: (s) => s.boolean('f'), good: [true, false] },
    text: { read: (s) => s.text('f', 3), good: ['', 'abc'] },
    bigint: { read: (s) => s.bigint('f', 16), good: ['0', 'ffff'] },
    bytes: { read: (s) => s.bytes('f', 2), good: ['AAA='] },
    object: { read: (s) => s.object('f'), good: [{}, { a: 1 }] },
    list: { read: (s) => s.list('f', 2), good: [[], [{}, {}]] },
    numbers: { read: (s) => s.numbers('f', 2, 1, 2), good: [[], [1, 2]] },
  };
  for (const [name, { read, good }] of Object.entries(kinds)) {
    test(name, () => {
      for (const f of good) expect(() => read(reader({ f }))).not.toThrow();
      const isGood = (value: Json) => good.some((one) => JSON.stringify(one) === JSON.stringify(value));
      for (const f of OTHERS) if (!isGood(f)) refuses(() => read(reader({ f })), path);
    });
  }

  test('limits', () => {
    refuses(() => reader({ f: 'abcd' }).text('f', 3), path);
    refuses(() => reader({ f: '10000' }).bigint('f', 16), path);
    refuses(() => reader({ f: '0x1' }).bigint('f', 16), path);
    refuses(() => reader({ f: 'FF' }).bigint('f', 16), path);
    refuses(() => reader({ f: 'AAAAAAAA' }).bytes('f', 2, 3), path);
    refuses(() => reader({ f: 'A'.repeat(1000) }).bytes('f', 2, 3), path);
    refuses(() => reader({ f: [{}, {}, {}] }).list('f', 2), path);
    refuses(() => reader({ f: [{}, 5] }).list('f', 2), `${path}[1]`);
    refuses(() => reader({ f: [1, 3] }).numbers('f', 2, 1, 2), `${path}[1]`);
    refuses(
      () =>
        reader({ f: { g: 5 } })
          .object('f')
          .text('g', 2),
      `${path}.g`,
    );
    refuses(
      () =>
        reader({ f: [{ g: 5 }] })
          .list('f', 1)[0]
          ?.text('g', 2),
      `${path}[0].g`,
    );
  });
});

test('values come as they were saved', () => {
  const state = reader({ n: -5, b: 'fedcba9876543210', t: 'é', y: bytesToState(Uint8Array.of(1, 2, 255)), r: [1] });
  expect(state.number('n', -5, 5)).toBe(-5);
  expect(state.bigint('b')).toBe(0xfedc_ba98_7654_3210n);
  expect(state.text('t', 1)).toBe('é');
  expect([...state.bytes('y', 3)]).toEqual([1, 2, 255]);
  expect(state.raw('r')).toEqual([1]);
  const view = new DataView(new ArrayBuffer(8), 2, 3);
  view.setUint8(0, 9);
  expect([...reader({ y: bytesToState(view) }).bytes('y', 3)]).toEqual([9, 0, 0]);
});

test('only own fields are fields', () => {
  for (const name of ['constructor', 'toString', '__proto__', 'hasOwnProperty']) {
    expect(reader({}).has(name)).toBe(false);
    expect(reader({}).raw(name)).toBe(undefined);
  }
  expect(new StateReader(JSON.parse('{"__proto__":{"f":1}}'), '').has('f')).toBe(false);
});

test('what is no object has no fields', () => {
  for (const value of [undefined, null, 5, 'text', true]) {
    expect(new StateReader(value, '').has('length')).toBe(false);
    refuses(() => new StateReader(value, '').object('f'), 'snapshot: f is not an object');
  }
});
