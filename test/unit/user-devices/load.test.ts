import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, test } from 'vitest';
import type { DeviceModule } from '#dist/index.js';
import { commandLine } from '#dist/machine/command-line.js';
import { type MachineConfig, resolveConfig } from '#dist/machine/config.js';
import { UserDevices } from '#dist/machine/user-devices/user-devices.js';
import { RecordingServices } from '../../support/devices/services.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const WRONG = 'test/support/devices/wrong.js';
const folder = temporaryFolder();
const config = (devices: readonly DeviceModule[], rest: Partial<MachineConfig> = {}) =>
  resolveConfig({ kernel: 'vmlinux', ...rest, devices });
const load = (devices: readonly DeviceModule[], rest?: Partial<MachineConfig>) =>
  UserDevices.load(config(devices, rest), new RecordingServices());
const named = (exportName: string, count: number) =>
  Array.from({ length: count }, (_, n) => ({ module: WRONG, export: exportName, name: `${exportName}${n}` }));

describe('devices in the configuration', () => {
  test('a module is a path from here or a file: URL; its name is the default', () => {
    const url = pathToFileURL(WRONG);
    for (const module of [WRONG, url, url.href]) {
      expect(config([{ module }]).devices).toEqual([
        { name: 'wrong', module: url.href, exportName: 'default', options: undefined },
      ]);
    }
    expect(config([{ module: '/a b/c#d.js', name: 'x' }]).devices[0]?.module).toBe('file:///a%20b/c%23d.js');
  });

  for (const [device, message] of [
    [{ module: '' }, /devices\[0\].module: '' is neither/],
    [{ module: 'file:///' }, /devices\[0\].name: '' is not/],
    [{ module: new URL('http://localhost/x.js') }, /devices\[0\].module: 'http:.*' is neither a path nor a file: URL/],
    [{ module: 'file://elsewhere/x.js' }, /devices\[0\].module: 'file:.*' is neither/],
    [{ module: 3 as unknown as string }, /devices\[0\].module/],
    [{ module: 'x.js', export: '' }, /devices\[0\].export/],
    [{ module: 'x.js', name: 'a b' }, /devices\[0\].name: 'a b' is not letters/],
    [{ module: 'my device.js' }, /devices\[0\].name/],
    [{ module: 'rng.js' }, /devices\[0\].name: 'rng' is a device of the machine's own/],
    [{ module: 'x.js', options: () => {} }, /devices\[0\].options: .*could not be cloned/],
  ] as const) {
    test(`refuses ${String(device.module)} ${Object.keys(device)}`, () => {
      expect(() => config([device])).toThrow(message);
      expect(() => config([device])).toThrow(expect.objectContaining({ code: 'ERR_USAGE' }));
    });
  }

  test('refuses two of a name', () => {
    expect(() => config([{ module: 'a/x.js' }, { module: 'b/x.js' }])).toThrow(
      /devices\[1\].name: there is a 'x' already/,
    );
  });
});

describe('a device that cannot be had is an error that names it, its module and why', () => {
  writeFileSync(join(folder, 'syntax.mjs'), 'export default class {');
  writeFileSync(join(folder, 'throws.mjs'), "throw new Error('while it was loaded');");
  for (const [device, why] of [
    [{ module: '/nowhere/x.js' }, /^it cannot be loaded: Error: Cannot find module/],
    [{ module: join(folder, 'syntax.mjs') }, /^it cannot be loaded: SyntaxError/],
    [{ module: join(folder, 'throws.mjs') }, /^it cannot be loaded: Error: while it was loaded \(at /],
    [{ module: WRONG, export: 'none' }, /^there is no export 'none' that extends VirtioDevice or MmioDevice/],
    [{ module: WRONG, export: 'notAClass' }, /^its export 'notAClass' is no class that extends/],
    [{ module: WRONG, export: 'Stranger' }, /^its export 'Stranger' is no class that extends/],
    [{ module: WRONG }, /^its export 'default' is no class that extends/],
    [{ module: WRONG, export: 'Throws', options: 5 }, /^its constructor threw RangeError: not with 5 \(at .*wrong\.js/],
    [{ module: WRONG, export: 'Large' }, /^size: 1073741824 is not/],
    [{ module: WRONG, export: 'NoType' }, /^type: 0 is not/],
    [{ module: WRONG, export: 'NoQueues' }, /^queueSizes: must have/],
  ] as const) {
    test(`${device.module.split('/').at(-1)} ${'export' in device ? device.export : ''}`, async () => {
      const error = (await load([{ ...device, name: 'mine' }]).catch((error) => error)) as Error;
      expect(error).toMatchObject({ code: 'ERR_DEVICE', name: 'DeviceError' });
      const [, url, reason] = /^device 'mine' \((.*?)\): (.*)$/s.exec(error.message) ?? [];
      expect([url, reason]).toEqual([pathToFileURL(device.module).href, expect.stringMatching(why)]);
      expect(error.message).not.toMatch(/\n/);
    });
  }
});

describe('the places of devices', () => {
  test('virtio devices come after the machine’s own, MMIO devices have interrupts from the other end', async () => {
    const devices = [...named('Fine', 2), ...named('FineVirtio', 2), ...named('Silent', 1)];
    const loaded = await load(devices, { rng: true, consolePorts: [{ name: 'x' }] });
    expect(loaded.places).toEqual([
      { base: 0xd100_0000, length: 2 ** 20 + 1, gsi: 23 },
      { base: 0xd120_0000, length: 2 ** 20 + 1, gsi: 22 },
      { base: 0xd000_2000, length: 0x1000, gsi: 7 },
      { base: 0xd000_3000, length: 0x1000, gsi: 9 },
      { base: 0xd200_0000, length: 2 ** 24, gsi: undefined },
    ]);
    const words = commandLine(config(devices, { rng: true, append: 'last' }), 'hardware', loaded)
      .split(' ')
      .slice(-7);
    expect(words).toEqual([
      'virtio_mmio.device=4K@0xd0000000:5',
      'virtio_mmio.device=4K@0xd0001000:6',
      'virtio_mmio.device=4K@0xd0002000:7',
      'tsvisor.device=Fine0@0xd1000000:23',
      'tsvisor.device=Fine1@0xd1200000:22',
      'tsvisor.device=Silent0@0xd2000000',
      'last',
    ]);
  });

  test('there are as many as there are interrupts, and as much as there is address space', async () => {
    const many = await load([...named('Fine', 10), ...named('FineVirtio', 8)]);
    expect(new Set(many.places.map(({ gsi }) => gsi)).size).toBe(18);
    await expect(load([...named('Fine', 10), ...named('FineVirtio', 8)], { rng: true })).rejects.toThrow(
      'devices: a machine has 18 interrupts: too few for 1 virtio devices of its own and 18 of yours',
    );
    await load(named('Silent', 31));
    await expect(load(named('Silent', 32))).rejects.toThrow(
      "device 'Silent31': there is no address space left for 16777216 bytes",
    );
  });
});
