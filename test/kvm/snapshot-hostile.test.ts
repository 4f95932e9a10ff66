import { once } from 'node:events';
import {
  closeSync,
  cpSync,
  existsSync,
  openSync,
  readdirSync,
  renameSync,
  statSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import type { RestoreOptions } from '#dist/snapshot/restore.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { COUNTING_MEMORY, countingMachine, countsOn, RESET_FLAG } from '../support/snapshot/counting-guest.js';
import { changeState, failureOf, type Json, set, stateIn } from '../support/snapshot/folder.js';
import { temporaryFolder } from '../support/temporary-folder.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const there = temporaryFolder();
const real = join(there, 'real');
const image = join(there, 'disk.img');
const secret = join(there, 'secret');
let copies = 0;

/** A copy of the real snapshot with another state. */
function crafted(change: (state: Json) => void): string {
  const folder = join(there, `copy${copies++}`);
  cpSync(real, folder, { recursive: true });
  changeState(folder, change);
  return folder;
}

async function refused(folder: string, options: RestoreOptions = {}): Promise<string> {
  const before = resources();
  const { code, message } = await failureOf(Machine.restore(folder, options));
  expect(`${code} ${message}`).toMatch(/^ERR_SNAPSHOT [^\p{Cc}]*$/u);
  await expectNoMoreThan(before);
  return message;
}

/** The guest of a snapshot is to reset itself. */
function letReset(folder: string): void {
  const memory = openSync(join(folder, 'memory'), 'r+');
  writeSync(memory, Uint8Array.of(1), 0, 1, RESET_FLAG);
  closeSync(memory);
}

describeKvm('what a crafted snapshot cannot do', () => {
  beforeAll(async () => {
    writeFileSync(image, Buffer.alloc(2 ** 20, 'image'));
    writeFileSync(secret, Buffer.alloc(COUNTING_MEMORY, 'secret'));
    await using machine = await countingMachine({
      drives: [{ file: image }],
      networks: [{ type: 'user' }],
      consolePorts: [{ name: 'port' }],
      vsock: true,
      rng: true,
    });
    await machine.start();
    await countsOn(machine);
    await machine.snapshot(real);
  });

  test('nothing of it is needed: the snapshot as it is goes on', async () => {
    const state = stateIn(real);
    expect(JSON.stringify(state.config)).not.toContain('/');
    expect(Object.keys(state.boot)).toEqual(['kernel']);
    await using machine = await Machine.restore(real);
    await machine.resume();
    await countsOn(machine);
  });

  describe('to have files of the host opened', () => {
    const reference = (path: string) => {
      const stat = statSync(path, { bigint: true });
      const [device, inode, size] = [stat.dev, stat.ino, stat.size].map(String);
      const [modifiedNs, changedNs] = [stat.mtimeNs, stat.ctimeNs].map(String);
      return { path, device, inode, size, modifiedNs, changedNs, contents: '0'.repeat(64) };
    };

    test('a drive that is only in the configuration', async () => {
      const folder = crafted(({ config }) => {
        config.drives[0].file = secret;
        config.drives[0].overlay = join(there, 'made');
      });
      await using machine = await Machine.restore(folder);
      await machine.resume();
      await countsOn(machine);
      expect(existsSync(join(there, 'made'))).toBe(false);
      const more = crafted(({ config }) => config.drives.push({ file: secret }));
      expect(await refused(more)).toContain('config.drives are not 1');
    });

    for (const kind of ['reference', 'overlay']) {
      test(`a file that its author may not read, as ${kind}`, async () => {
        const folder = crafted((state) => {
          state.disks = [{ kind, files: [reference(secret)] }];
        });
        expect(await refused(folder)).toContain(`${secret} of drives[0] is missing or was changed since`);
      });
    }

    test('the other file of a drive for which one is given', async () => {
      const folder = crafted((state) => {
        state.disks = [{ kind: 'reference', files: [reference(image), reference(secret)] }];
      });
      expect(await refused(folder, { drives: [{ file: image }] })).toContain(`${secret} of drives[0]`);
    });

    test('a writable overlay of a read-only drive', async () => {
      const folder = crafted(({ config }) => {
        config.drives[0].readOnly = true;
      });
      expect(await refused(folder)).toContain('config.drives[0].readOnly');
    });

    test('links in its folder', async () => {
      for (const name of ['memory', 'disk-0.raw']) {
        const folder = crafted(() => {});
        renameSync(join(folder, name), join(folder, 'moved'));
        symlinkSync(name === 'memory' ? secret : image, join(folder, name));
        expect(await refused(folder)).toContain(join(folder, name));
      }
    });

    for (const field of ['kernel', 'initrd', 'agentProgram']) {
      test(`${field}, when the guest resets itself`, async () => {
        const folder = crafted((state) => {
          state.config[field] = secret;
          state.config.onReset = 'restart';
          state.boot[field] = reference(secret);
        });
        letReset(folder);
        await using machine = await Machine.restore(folder);
        await machine.resume();
        expect(await machine.wait()).toMatchObject({ reason: 'guest-reset' });
      });
    }

    test('files of which there is only the name', async () => {
      const folder = crafted((state) => {
        Object.assign(state.config, { initrd: secret, agentProgram: secret });
      });
      letReset(folder);
      await using machine = await Machine.restore(folder);
      await machine.resume();
      await once(machine, 'reset');
      await countsOn(machine);
    });
  });

  test('to open ports and sockets', async () => {
    const socket = join(there, 'socket');
    const folder = crafted(({ config }) => {
      config.networks = [{ type: 'user', hostForwards: [{ hostPort: 0, guestPort: 22 }], name: 'tap0' }];
      config.vsock = { cid: 5, socket };
    });
    await using machine = await Machine.restore(folder);
    expect(machine.hostForwards).toEqual([]);
    expect(existsSync(socket)).toBe(false);
    const tap = crafted(({ config }) => {
      config.networks = [{ type: 'tap', name: 'eth0' }];
    });
    expect(await refused(tap)).toContain('networks[0] has a tap of the host; give networks again');
  });

  test('to have code loaded', async () => {
    const folder = crafted(({ config }) => {
      config.devices = [{ module: join(there, 'evil.js') }];
    });
    expect(await refused(folder)).toContain('give their modules again');
  });

  test('to have more memory than its file: this process would end', async () => {
    const folder = crafted(({ config }) => {
      config.memory = 2 ** 30;
    });
    await using machine = await Machine.restore(folder);
    await machine.resume();
    await countsOn(machine);
    await machine.snapshot(join(there, 'again'));
    expect(statSync(join(there, 'again', 'memory')).size).toBe(COUNTING_MEMORY);
  });

  test('to write to the terminal', async () => {
    const name = '\x1b[2Jport\n';
    expect(await refused(crafted(({ config }) => (config.consolePorts[0].name = name)))).toContain('?[2Jport?');
  });

  const wrongs = [
    set('machine', {}),
    ...[[], [{}, {}]].map((value) => set('machine.vcpus', value)),
    ...[[], [{ registers: '' }]].map((value) => set('machine.irqchips', value)),
    set('machine.pit', 'AAAA'),
    set('machine.devices', { serial: 5 }),
    set('machine.vcpus.0.mpState', 17),
    set('machine.vcpus.0.xcr0', '2'), // AVX without SSE, and without x87
    set('machine.vcpus.0.cpuid', Buffer.alloc(8, 0xff).toString('base64')),
    set('machine.vcpus.0.msrs', [{ index: 0xdeadbeef, value: '0' }]),
    set('machine.vcpus.0.msrs', [{ index: 0x1b, value: 'ffffffffffffffff' }]),
  ] as const;
  test.for(wrongs)('%s: refused', async ([, change]) => {
    await refused(crafted(change));
  });

  test('to leave anything behind', () => {
    expect(readdirSync(there).filter((name) => !/^(copy\d+|real|again|disk\.img|secret)$/.test(name))).toEqual([]);
  });
});
