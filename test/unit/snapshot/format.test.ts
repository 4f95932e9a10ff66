import { describe, expect, test } from 'vitest';
import { printable } from '#dist/agent/guest-error.js';
import { decodeState, encodeState } from '#dist/snapshot/format.js';
import { Random } from '../../kvm/assist/random.js';
import { anyState, type Json, MEMORY, sealed } from '../../support/snapshot/folder.js';

const reference = (path = '/images/disk') => ({
  path,
  device: '1',
  inode: '18446744073709551615',
  size: '0',
  modifiedNs: '-1',
  changedNs: '1',
  contents: 'ab'.repeat(32),
});

const parent = { path: '../base', id: 'f'.repeat(32), checksum: '0'.repeat(64) };

/** A state with all that is optional. */
const whole = () =>
  anyState({
    boot: { kernel: reference('/kernel'), initrd: reference('/initrd'), agentProgram: reference('/agent') },
    disks: [
      { kind: 'reference', files: [reference(), reference('/images/overlay')] },
      { kind: 'overlay', files: [reference()] },
      { kind: 'raw', files: [] },
    ],
    memory: { size: MEMORY, parent, extents: [[0, 1], [2, 510]] }, // biome-ignore format: pairs
  });

const decode = (bytes: Buffer) => decodeState(bytes, 'there/state');

function refusal(bytes: Buffer): string {
  try {
    decode(bytes);
  } catch (error) {
    expect(error).toMatchObject({ code: 'ERR_SNAPSHOT' });
    const { message } = error as Error;
    expect(message).toBe(printable(message));
    return message;
  }
  throw new Error('it was not refused');
}

describe('a state file', () => {
  test('gives back what was saved', () => {
    for (const state of [anyState(), whole()]) {
      const { checksum, ...found } = decode(encodeState(state));
      expect(found).toEqual({ boot: undefined, memoryChecksums: undefined, ...state });
      expect(checksum).toMatch(/^[0-9a-f]{64}$/);
    }
  });

  test('that was cut is refused, wherever', () => {
    const bytes = encodeState(whole());
    for (let length = 0; length < bytes.length; length++) refusal(bytes.subarray(0, length));
  });

  test('with any bit changed is refused', () => {
    const bytes = encodeState(anyState());
    for (let bit = 0; bit < 8 * bytes.length; bit++) {
      const changed = Buffer.from(bytes);
      changed[bit >> 3] = (changed[bit >> 3] as number) ^ (1 << (bit & 7));
      refusal(changed);
    }
  });

  test('of another version is refused by it', () => {
    const body = JSON.stringify(anyState());
    expect(refusal(sealed(body, 2))).toBe('there/state: a snapshot of version 2; this tsvisor knows version 1');
    expect(refusal(sealed(body, 0))).toContain('version 0');
    expect(refusal(sealed(body, 999_999_999))).toContain('version 999999999');
    expect(refusal(sealed(body, 1e9))).toContain('not the state of a snapshot');
  });

  for (const [what, body] of [
    ['nothing', ''],
    ['text', 'hello'],
    ['null', 'null'],
    ['a number', '5'],
    ['a list', '[]'],
    ['an empty object', '{}'],
    ['an unfinished object', '{"id":'],
    ['bytes that are no UTF-8', Buffer.from([0x22, 0xff, 0xfe, 0x22])],
    ['100000 lists in each other', '['.repeat(100_000)],
    ['an object with a million values', `{"id":[${'0,'.repeat(2 ** 20)}0]}`],
    ['an object with a million objects', `{"id":[${'{},'.repeat(2 ** 20)}{}]}`],
  ] as const) {
    test(`that holds ${what} is refused`, () => {
      refusal(sealed(body));
    });
  }

  test('brackets and commas in texts do not count', () => {
    const config = { append: `"${'[{,'.repeat(2 ** 20)}\\"` };
    expect(decode(encodeState(anyState({ config }))).config).toEqual(config);
  });

  test('names that JavaScript has a meaning for are names', () => {
    const body = JSON.stringify(anyState()).replace('"id":', '"__proto__":{"id":5},"constructor":1,"id":');
    expect(decode(sealed(body)).id).toBe(anyState().id);
    expect(refusal(sealed(body.replace('"host":', '"__proto__":{"host":{}},"hos":')))).toContain(
      'host is not an object',
    );
  });
});

describe('a wrong field of a state is refused by name', () => {
  const wrong = (name: string, change: (state: Json) => void) => ({ name, change });
  const set = (path: string, value: unknown) =>
    wrong(`${path} ${JSON.stringify(value)?.slice(0, 40)}`, (state) => {
      const names = path.split(/[.[\]]+/).filter((name) => name !== '');
      const last = names.pop() as string;
      names.reduce((at, name) => at[name], state)[last] = value;
    });
  const cases = [
    ...[undefined, null, 5, '', 'x'.repeat(32), 'F'.repeat(32), 'f'.repeat(31), 'f'.repeat(33)].map((id) =>
      set('id', id),
    ),
    ...[undefined, 5, 'x'.repeat(65)].map((value) => set('created', value)),
    ...[undefined, [], 5].map((value) => set('host', value)),
    ...[undefined, 5, 'x'.repeat(257)].map((value) => set('host.cpu', value)),
    ...[undefined, null, [], 'x'].flatMap((value) => [set('config', value), set('machine', value)]),
    ...[null, [], 5, {}].map((value) => set('boot', value)),
    ...[null, {}, [], 'x'].map((value) => set('boot.initrd', value)),
    ...[undefined, {}, 5, [5], [[]], new Array(65).fill({ kind: 'raw', files: [] })].map((value) =>
      set('disks', value),
    ),
    ...[undefined, 'qcow2', 5].map((value) => set('disks[0].kind', value)),
    ...[undefined, [], [reference(), reference(), reference()], [null]].map((value) => set('disks[0].files', value)),
    ...[[], [reference(), reference()]].map((value) => set('disks[1].files', value)),
    set('disks[2].files', [reference()]),
    ...[undefined, '', 'relative', '/a\0b', `/${'x'.repeat(4096)}`].map((value) =>
      set('disks[0].files[0].path', value),
    ),
    ...[undefined, 5, '', '1.5', '1e3', '1'.repeat(25)].map((value) => set('disks[0].files[0].inode', value)),
    ...[undefined, '', 'g'.repeat(64), 'a'.repeat(63)].map((value) => set('disks[0].files[0].contents', value)),
    ...[undefined, 0, -4096, 4095, 4097, 2 ** 40 + 4096, 2 ** 60, 4096.5, '4096'].map((v) => set('memory.size', v)),
    ...[null, [], '../base'].map((value) => set('memory.parent', value)),
    ...[undefined, 5, '\0', 'x'.repeat(4097)].map((value) => set('memory.parent.path', value)),
    ...[undefined, 'f'.repeat(31)].map((value) => set('memory.parent.id', value)),
    ...[undefined, 'f'.repeat(63)].map((value) => set('memory.parent.checksum', value)),
    ...[
      undefined,
      {},
      [5],
      [[0]],
      [[0, 1, 2]],
      [[0, 0]],
      [[-1, 1]],
      [[0, 513]],
      [[512, 1]],
      [[0.5, 1]],
      [[1, 1], [0, 1]], // biome-ignore format: pairs
      [[0, 2], [1, 1]], // biome-ignore format: pairs
      [[2 ** 53, 1]],
      [['0', '1']],
      new Array(1025).fill([0, 1]),
    ].map((value) => set('memory.extents', value)),
  ];
  for (const { name, change } of cases) {
    test(name, () => {
      const state: Json = structuredClone(whole());
      change(state);
      const field = name.split(' ')[0] as string;
      expect(refusal(sealed(JSON.stringify(state)))).toContain(field.split(/[[.]/)[0]);
    });
  }
});

test('whatever somebody makes of it, a state is decoded or refused', () => {
  const random = new Random();
  const body = Buffer.from(JSON.stringify(whole()));
  for (let n = 0; n < 3000; n++) {
    const changed = Buffer.from(body);
    for (let i = 1 + random.below(4); i > 0; i--) changed[random.below(changed.length)] = random.below(256);
    try {
      decode(sealed(changed));
    } catch (error) {
      expect(error, `seed ${random.seed}`).toMatchObject({ code: 'ERR_SNAPSHOT' });
    }
  }
});
