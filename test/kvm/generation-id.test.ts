import { closeSync, openSync, readSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import * as abi from '#dist/kvm/generated/abi.js';
import { gsi, layout, PAGE_SIZE } from '#dist/machine/layout.js';
import { describeKvm } from '../support/kvm.js';
import { countingMachine, countsOn } from '../support/snapshot/counting-guest.js';
import { stateIn } from '../support/snapshot/folder.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
/** linux/kvm.h: struct kvm_pic_state begins with last_irr and irr. */
const PIC_IRR = abi.kvm_irqchip.chip + 1;

/** What a snapshot has at the VM generation ID's place. */
function idIn(snapshot: string): string {
  const id = Buffer.alloc(16);
  const fd = openSync(join(snapshot, 'memory'), 'r');
  readSync(fd, id, 0, 16, layout.vmGenerationId);
  closeSync(fd);
  return id.toString('hex');
}

/** Whether the interrupt that tells of a change was raised: the PIC, which no guest program here uses, has kept it. */
function wasTold(snapshot: string): boolean {
  const pic = Buffer.from(stateIn(snapshot).machine.irqchips[0].registers, 'base64');
  return ((pic[PIC_IRR] as number) & (1 << gsi.vmGenerationId)) !== 0;
}

describeKvm('the VM generation ID', () => {
  const first = join(folder, 'first');
  let machine: Machine;
  beforeAll(async () => {
    machine = await countingMachine();
    await machine.start();
    await countsOn(machine);
    await machine.snapshot(first);
  });
  afterAll(() => machine?.close());

  test('is there from the start, and another one in each machine that goes on from a snapshot', async () => {
    const ids = [idIn(first)];
    expect(wasTold(first)).toBe(false);
    for (const name of ['second', 'third']) {
      await using restored = await Machine.restore(first);
      await restored.snapshot(join(folder, name));
      ids.push(idIn(join(folder, name)));
      expect(wasTold(join(folder, name))).toBe(true);
    }
    await machine.snapshot(join(folder, 'later'));
    expect(idIn(join(folder, 'later'))).toBe(ids[0]);
    expect(new Set([...ids, '0'.repeat(32)]).size).toBe(4);
  });

  test('is in a differential snapshot', async () => {
    const from = join(folder, 'differential');
    await using restored = await Machine.restore(first, { track: true });
    await restored.snapshot(from, { differential: true });
    const page = layout.vmGenerationId / PAGE_SIZE;
    const { extents } = stateIn(from).memory;
    expect(extents.some(([start, count]: [number, number]) => page >= start && page < start + count)).toBe(true);
    expect(idIn(from)).not.toBe(idIn(first));
  });

  test('is not there without ACPI', async () => {
    await using without = await countingMachine({ acpi: 'off' });
    await without.start();
    await countsOn(without);
    const [before, after] = ['off', 'off again'].map((name) => join(folder, name));
    await without.snapshot(before as string);
    await using restored = await Machine.restore(before as string);
    await restored.snapshot(after as string);
    expect([before, after].map((name) => idIn(name as string))).toEqual(['0'.repeat(32), '0'.repeat(32)]);
    expect(wasTold(after as string)).toBe(false);
  });
});
