import { readdirSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { referenceTo } from '#dist/snapshot/file-reference.js';
import { decodeState } from '#dist/snapshot/format.js';
import { portableConfig, type RestoreOptions, restoredConfig } from '#dist/snapshot/restore.js';
import { anyState, failureOf, type Json, MEMORY, sealed, set } from '../../support/snapshot/folder.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const there = temporaryFolder();
const image = join(there, 'image');
writeFileSync(image, Buffer.alloc(4096));
const kernel = join(there, 'kernel');
writeFileSync(kernel, 'kernel');

const config = {
  onReset: 'restart',
  drives: [{ readOnly: true, id: 'a' }, {}, {}],
  networks: [{ type: 'user', mac: '52:54:00:00:00:01' }, { type: 'frames' }],
  consolePorts: [{ name: 'port' }],
  devices: [],
  vsock: { cid: 7 },
  rng: true,
};

const disks = () => [
  { kind: 'reference', files: [referenceTo(image)] },
  { kind: 'raw', files: [] },
  { kind: 'overlay', files: [referenceTo(image)] },
];
for (const name of ['disk-1.raw', 'disk-2.overlay']) writeFileSync(join(there, name), 'x');

function restored(change: (state: Json) => void = () => {}, options: RestoreOptions = {}) {
  const state: Json = { ...anyState(), boot: { kernel: referenceTo(kernel) }, disks: disks() };
  state.config = structuredClone(config);
  change(state);
  return restoredConfig(decodeState(sealed(JSON.stringify(state)), 'state'), there, options);
}

test('what was saved is what is restored', async () => {
  const { config: found, networks, scratch } = await restored();
  expect(found).toMatchObject({ kernel, initrd: undefined, memory: MEMORY, onReset: 'restart', vsock: { cid: 7 } });
  expect(found.drives).toMatchObject([
    { file: image, readOnly: true, id: 'a', overlay: undefined },
    { file: join(there, 'disk-1.raw'), overlay: join(scratch as string, 'disk-1.overlay') },
    { file: image, overlay: join(scratch as string, 'disk-2.overlay') },
  ]);
  expect(readdirSync(scratch as string)).toEqual(['disk-2.overlay']);
  expect(networks).toEqual([{ type: 'user', mac: '52:54:00:00:00:01' }, { type: 'frames' }]);
});

test('what is given is in place of what was saved, and in the next snapshot', async () => {
  const overlay = join(there, 'mine');
  const options: RestoreOptions = {
    drives: [undefined, { file: kernel, overlay }],
    networks: [{ type: 'user', allow: () => true, mac: '52:54:00:00:00:02' }, { type: 'frames' }],
    vsock: { cid: 9, socket: join(there, 'socket') },
  };
  const { config: found, portable } = await restored(() => {}, options);
  expect(found.drives[1]).toMatchObject({ file: kernel, overlay });
  expect(found.vsock).toEqual({ cid: 9, socket: join(there, 'socket') });
  expect(portable).toMatchObject({
    vsock: { cid: 9 },
    networks: [{ type: 'user', filtered: true, mac: '52:54:00:00:00:02' }, { type: 'frames' }],
  });
  expect(JSON.stringify(portable)).not.toContain('/');
});

test('a portable configuration names nothing of this host', () => {
  const portable = portableConfig({
    kernel,
    initrd: kernel,
    agentProgram: kernel,
    drives: [{ file: image, overlay: image, cache: 'unsafe' }],
    networks: [
      { type: 'tap', name: 'tap0' },
      { type: 'user', hostForwards: [] },
    ],
    vsock: { cid: 5, socket: image },
    devices: [{ module: image, name: 'dice', options: { secret: 1 } }],
    append: 'quiet',
  });
  expect(portable).toEqual({
    append: 'quiet',
    drives: [{ cache: 'unsafe' }],
    networks: [{ type: 'tap' }, { type: 'user' }],
    vsock: { cid: 5 },
    devices: [{ name: 'dice' }],
  });
});

describe('a reset ends the machine', () => {
  for (const [what, change] of [
    ['that has no references to boot files', (state: Json) => delete state.boot],
    ['whose kernel has changed', (state: Json) => (state.boot.kernel.inode = '1')],
    ['whose initrd has changed', (state: Json) => (state.boot.initrd = { ...referenceTo(kernel), size: '1' })],
  ] as const) {
    test(what, async () => expect((await restored(change)).config.onReset).toBe('end'));
  }
});

describe('a crafted configuration', () => {
  test('leads to nothing of the host', async () => {
    const secret = '/etc/hostname';
    const { config: found, networks } = await restored((state) => {
      Object.assign(state.config, { kernel: secret, initrd: secret, agentProgram: secret, memory: 2 ** 40 });
      state.config.vsock = { cid: 8, socket: secret };
      state.config.drives = [{ file: secret }, { overlay: secret }, { file: secret, overlay: secret }];
      state.config.networks = [
        { type: 'user', hostForwards: [{ hostPort: 1, guestPort: 1 }] },
        { type: 'frames', name: secret },
      ];
    });
    expect(JSON.stringify(found)).not.toContain(secret);
    expect(found.memory).toBe(MEMORY);
    expect(networks).toEqual([{ type: 'user' }, { type: 'frames' }]);
  });

  const anything = [null, 0, 'x', {}, [null], { length: 1 }];
  const wrongs = [
    ...['networks', 'drives', 'devices'].flatMap((name) => anything.map((value) => set(`config.${name}`, value))),
    ...anything.map((value) => set('config.consolePorts', value)),
    ...[0, 'x', [], {}, null, { type: 'x', rows: 1, columns: 1, more: 1 }].map((v) => set('config.terminal', v)),
    ...[5, 'a b', 'a\0'].map((type) => set('config.terminal', { type, rows: 1, columns: 1 })),
    ...[-1, 65536, 'y', 0.5].map((rows) => set('config.terminal', { type: 'x', rows, columns: 1 })),
    ...[5, null, {}, 'a\0b'].map((value) => set('config.append', value)),
    ...[null, 5, [], { cid: -1 }, { cid: 2 }, { cid: '5' }].map((value) => set('config.vsock', value)),
    ...[{}, { toString: 5 }, 'x', null].map((value) => set('config.acpi', value)),
    ...[{}, 5, { bytesPerSecond: 'x' }, { bytesPerSecond: 1, more: 1 }].map((value) => set('config.rng', value)),
    ...['explode', 5, null].map((value) => set('config.onReset', value)),
    ...[5, 'true'].flatMap((value) => ['agent', 'serial', 'defaultInit'].map((name) => set(`config.${name}`, value))),
    ...[0, 255, '1', 1.5, 2 ** 53].map((value) => set('config.cpus', value)),
    ...['hvc0', 'tty1', 5, {}].map((value) => set('config.console', value)),
    ...[5, 'no'].map((value) => set('config.drives.1.readOnly', value)),
    ...['x', {}, 5].flatMap((value) => [set('config.drives.1.cache', value), set('config.drives.1.onError', value)]),
    ...[5, 'x'.repeat(21), 'a b', 'é'].map((value) => set('config.drives.1.id', value)),
    ...['x', 5, '01:00:00:00:00:00'].map((value) => set('config.networks.0.mac', value)),
    ...['tap', 'vde', 5, undefined].map((value) => set('config.networks.0.type', value)),
    set('config.networks.0.filtered', true),
    set('config.consolePorts.0.name', '\x1b[2J\n'),
    set('config.consolePorts', [{ name: 'a' }, { name: 'a' }]),
    set('config.consolePorts', new Array(17).fill({ name: 'a' })),
    set('config.drives.1.readOnly', true),
    set('disks', []),
    set('memory.size', 4096),
  ];
  test.for(wrongs)('%s: refused', async ([, change]) => {
    const { code, message } = await failureOf(restored(change));
    expect(`${code} ${message}`).toMatch(/^ERR_SNAPSHOT [^\p{Cc}]*$/u);
  });
});

describe('wrong options are the caller’s', () => {
  for (const [options, message] of [
    [{ drive: [] }, 'options.drive: there is no such field'],
    [{ drives: {} }, 'drives: must be an array'],
    [{ drives: [5] }, 'drives[0]: must be an object'],
    [{ drives: [{ path: 'x' }] }, 'drives[0].path: there is no such field'],
    [{ drives: [{ file: 5 }] }, 'drives[0].file: must be a path'],
    [{ drives: [{ overlay: '' }] }, 'drives[0].overlay: must be a path'],
    [{ drives: [{}, {}, {}, {}] }, 'drives: 4 are given, but the machine had 3'],
    [{ networks: [] }, 'networks: 0 are given, but the machine had 2'],
    [{ networks: [{ type: 'user' }, null] }, 'networks[1].type: the machine had frames there'],
    [{ networks: [{ type: 'frames' }, { type: 'frames' }] }, 'networks[0].type: the machine had user there'],
    [{ networks: [{ type: 'user', mac: 'x' }, { type: 'frames' }] }, "networks[0].mac: 'x' is not like"],
    [{ devices: [{ module: 'x.js' }] }, 'devices: 1 are given, but the machine had 0'],
    [{ vsock: { cid: 1 } }, 'vsock.cid: 1 is not a number from 3'],
    [{ vsock: { port: 1 } }, 'vsock.port: there is no such field'],
  ] as [RestoreOptions, string][]) {
    test(message, async () => {
      const failure = await failureOf(restored(() => {}, options));
      expect(failure).toEqual({ code: 'ERR_USAGE', message: expect.stringContaining(message) });
    });
  }
});

describe('a file of a drive is refused', () => {
  test('a copy that is missing, or an overlay that exists', async () => {
    const raw = (state: Json) => {
      state.disks = [...disks().slice(0, 1), { kind: 'raw', files: [] }, { kind: 'raw', files: [] }];
    };
    expect((await failureOf(restored(raw))).message).toContain(`${join(there, 'disk-2.raw')}: there is no such file`);
    for (const index of [1, 2]) {
      const drives = [undefined, undefined, undefined].map((_, at) => (at === index ? { overlay: image } : undefined));
      const { code, message } = await failureOf(restored(() => {}, { drives }));
      expect(`${code} ${message}`).toContain(`${image} exists already`);
    }
  });

  test('nothing is left of it', async () => {
    const scratch = () => readdirSync(tmpdir()).filter((name) => /^tsvisor-[A-Za-z0-9]{6}$/.test(name)).length;
    const before = scratch();
    const gone = (state: Json) => (state.disks[2].files[0].inode = '1');
    expect((await failureOf(restored(gone))).message).toContain(
      `${image} of drives[2] is missing or was changed since`,
    );
    expect(scratch()).toBe(before);
  });
});
