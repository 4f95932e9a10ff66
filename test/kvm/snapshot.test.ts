import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { countingMachine, countsOn } from '../support/snapshot/counting-guest.js';
import { stateIn } from '../support/snapshot/folder.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const there = temporaryFolder();

describeKvm('a machine is saved and restored', () => {
  test('it goes on counting, as the machine that it was taken of does', async () => {
    const folder = join(there, 'one');
    await using machine = await countingMachine();
    await machine.start();
    await countsOn(machine);
    await machine.snapshot(folder);
    expect(readdirSync(folder).sort()).toEqual(['memory', 'state']);
    await countsOn(machine);
    await using restored = await Machine.restore(folder);
    expect(restored.state).toBe('paused');
    await restored.resume();
    await countsOn(restored);
    expect(existsSync(folder)).toBe(true);
  });

  test('its state has the fields that docs/snapshot-format.md tells, no others', async () => {
    const folder = join(there, 'documented');
    const image = join(there, 'image');
    writeFileSync(image, Buffer.alloc(4096));
    await using machine = await countingMachine({
      drives: [{ file: image, readOnly: true }],
      vsock: true,
      initrd: image,
    });
    await machine.snapshot(folder, { track: true });
    await machine.snapshot(join(there, 'difference'), { differential: true });
    const state = stateIn(folder);
    const difference = stateIn(join(there, 'difference'));
    const [vcpu] = state.machine.vcpus;
    const objects = [state, difference, state.boot, state.boot.kernel, state.disks[0], difference.memory];
    objects.push(difference.memory.parent, state.machine, state.machine.devices, vcpu, vcpu.msrs[0], state.host);
    objects.push(state.machine.devices.mmio['virtio vsock'], state.machine.devices.mmio['virtio vsock'].queues[0]);
    const format = readFileSync('docs/snapshot-format.md', 'utf8');
    for (const name of objects.flatMap(Object.keys)) expect(format, name).toContain(`\`${name}\``);
    const told = [...format.matchAll(/^\| `(\w+)` \|/gm)].map(([, name]) => name);
    const fields = [...Object.keys(state), ...Object.keys(state.machine), ...Object.keys(vcpu)];
    const tables = ['state', 'memory', 'reference', 'overlay', 'raw'];
    for (const name of told) expect([...fields, ...tables], name).toContain(name);
  });
});
