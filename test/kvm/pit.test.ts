import { afterEach, expect, test } from 'vitest';
import { Kvm } from '#dist/kvm/kvm.js';
import type { SavedState } from '#dist/machine/virtual-machine.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { closeLayers, OUT_PORT, pitWithoutTime, Rig } from '../support/snapshot/rig.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const MEMORY = 2 ** 21 + 2 ** 16;
const folder = temporaryFolder();
let rigs: Rig[] = [];
afterEach(() => {
  for (const rig of rigs) rig[Symbol.dispose]();
  rigs = [];
});

/** Writes and reads ports a byte at a time, in that order, then tells the sum of what it read. */
function accesses(...list: readonly (readonly [port: number, value?: number])[]): string {
  const lines = list.map(([port, value]) =>
    value === undefined
      ? `mov dx, ${port}\nxor eax, eax\nin al, dx\nshl ebx, 8\nor ebx, eax`
      : `mov dx, ${port}\nmov al, ${value}\nout dx, al`,
  );
  return guestProgram(`xor ebx, ebx\n${lines.join('\n')}\nmov eax, ebx\nmov dx, ${OUT_PORT}\nout dx, eax\nhlt`);
}

/** An i8254 of KVM's that nobody has touched. */
function untouched(): string {
  using kvm = Kvm.open();
  using vm = kvm.createVm();
  vm.createIrqchip();
  vm.createPit2();
  return Buffer.from(vm.getPit()).toString('base64');
}

/** Runs a program in a machine as it is made, or in one that has had KVM's i8254 from the beginning. */
async function outcome(kernel: string, kvmAlone: boolean): Promise<{ read: number | undefined; pit: string }> {
  let rig = await Rig.create(kernel, MEMORY);
  rigs.push(rig);
  if (kvmAlone) {
    const saved = rig.save(folder);
    const state: SavedState = { ...saved.state, pit: untouched() };
    rig[Symbol.dispose]();
    rig = await Rig.create(kernel, MEMORY, { ...saved, state });
    rigs = [rig];
    closeLayers(saved);
  }
  rig.run(2e6, () => rig.out.length > 0);
  return { read: rig.out[0], pit: pitWithoutTime(rig.state().pit) };
}

describeKvm('the PIT, which is made at its first access,', () => {
  test('is not there before it', async () => {
    expect((await outcome(accesses(), false)).pit).toBe('');
  });

  const words = [0x34, 0x36, 0x30, 0x16, 0x18, 0x2b, 0x3e, 0x3d, 0x70, 0x5c, 0xb0, 0xb6, 0x00, 0x40, 0x80];
  const readBacks = [0xc0, 0xc2, 0xce, 0xde, 0xe8, 0xfe];
  const firsts = [
    ...[...words, ...readBacks].map((value) => [0x43, value] as const),
    ...[0, 1, 0xff].flatMap((value) => [0x40, 0x41, 0x42].map((port) => [port, value] as const)),
    ...[0, 1, 2, 3, 0xff].map((value) => [0x61, value] as const),
  ];
  test.each(firsts)('is as if it had been there: port %i, written %i', async (port, value) => {
    // What is read tells how it goes on: the first byte latched, or the status, of each channel.
    const program = accesses([port, value]);
    const [ours, kvms] = [await outcome(program, false), await outcome(program, true)];
    expect(ours.pit).not.toBe('');
    expect(ours).toEqual(kvms);
  });

  test.each([0x40, 0x41, 0x42, 0x43, 0x61])('is as if it had been there: port %i, read', async (port) => {
    const program = accesses([port]);
    const [ours, kvms] = [await outcome(program, false), await outcome(program, true)];
    expect(ours.pit).toBe(kvms.pit);
    expect(ours.read).toBeDefined();
    // Its count goes on with the time, as does the refresh clock, and the output of a channel that has run out.
    if (port === 0x43) expect(ours.read).toBe(kvms.read);
    if (port === 0x61) expect((ours.read as number) & ~0x30).toBe((kvms.read as number) & ~0x30);
  });

  test('tells a status that the first access asked for', async () => {
    const program = accesses([0x43, 0xe2], [0x40]); // read back: the status of channel 0
    expect((await outcome(program, false)).read).toBe((await outcome(program, true)).read);
  });

  test('goes on by the mode of the first access', async () => {
    // Its status then: low and high byte, mode 0. Whether it has run out is the host's load.
    const program = accesses([0x43, 0xb0], [0x61, 1], [0x42, 0xff], [0x42, 0xff], [0x43, 0xe8], [0x42]);
    for (const kvmAlone of [false, true]) {
      const { read, pit } = await outcome(program, kvmAlone);
      expect((read as number) & 0x7f).toBe(0x30);
      expect(Buffer.from(pit, 'base64').readUInt32LE(48)).toBe(0xffff); // the count that was loaded
    }
  });

  test('is no obstacle to a wide access', async () => {
    const program = guestProgram(
      `mov eax, 0x36\nmov dx, 0x43\nout dx, ax\nmov ax, 0xffff\nmov dx, 0x60\nout dx, eax\nin eax, dx\n` +
        `mov dx, ${OUT_PORT}\nout dx, eax\nhlt`,
    );
    expect((await outcome(program, false)).read).toBeDefined();
  });
});
