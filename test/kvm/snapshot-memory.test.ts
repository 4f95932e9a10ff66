import { expect, test } from 'vitest';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { closeLayers, OUT_PORT, Rig, type Saved } from '../support/snapshot/rig.js';
import { temporaryFolder } from '../support/temporary-folder.js';
import { Random } from './assist/random.js';

const folder = temporaryFolder();
const MiB = 2 ** 20;
const MEMORY = 8 * MiB;
const DEPTH = 3;
const random = new Random();
const hint = `seed ${random.seed}`;

/** Writes words all over the memory from 2 MiB to 8 MiB, in an order of its own. */
const SCATTERING = guestProgram(`
    mov r8, 12345
    mov rcx, 6364136223846793005
    mov dx, ${OUT_PORT}
  again:
    imul r8, rcx
    inc r8
    mov rax, r8
    shr rax, 42
    and rax, 0x3fffff
    mov [0x200000 + rax], r8
    test r8, 0xff00
    jnz again
    out dx, eax
    jmp again`);

/** Everything that a VMM does to memory, at random. */
function write(rig: Rig): void {
  const { memory } = rig.machine.ram;
  for (let n = random.below(20); n > 0; n--) {
    // Not over the guest's tables and its code.
    const at = 2 * MiB + random.below(MEMORY - 2 * MiB - 20_000);
    const length = 1 + random.below(random.pick([8, 64, 20_000]));
    const dice = random.below(5);
    if (dice === 0) memory.zero(at, length);
    else if (dice === 1) memory.writeU64(at, random.u64());
    else memory.write(at, new Uint8Array(length).fill(random.below(256)));
  }
}

describeKvm('differential snapshots', () => {
  test('have all that the guest and the VMM have written, on as many as there are', async () => {
    using source = await Rig.create(SCATTERING, MEMORY);
    source.run(3000, () => source.out.length > 0);
    source.machine.ram.trackDirtyPages(true);
    let saved: Saved = source.save(folder);
    for (let depth = 1; depth <= DEPTH; depth++) {
      for (let n = 0; n < 3; n++) {
        source.run(500 + random.below(3000));
        write(source);
      }
      const before = saved;
      saved = source.saveDifference(folder, saved);
      const extents = saved.layers.at(-1)?.extents ?? [];
      expect(extents.length).toBeGreaterThan(0);
      expect(saved.layers).toHaveLength(depth + 1);
      using restored = await Rig.create(SCATTERING, MEMORY, saved);
      expect(restored.memory.equals(source.memory), hint).toBe(true);
      using older = await Rig.create(SCATTERING, MEMORY, before);
      expect(older.memory.equals(source.memory), 'the difference was of nothing').toBe(false);
    }
    closeLayers(saved);
  });

  test('of a machine that was restored with tracking, and writes on', async () => {
    using first = await Rig.create(SCATTERING, MEMORY);
    first.run(5000);
    const base = first.save(folder);
    let saved = base;
    for (let depth = 1; depth <= DEPTH; depth++) {
      using rig = await Rig.create(SCATTERING, MEMORY, saved);
      rig.machine.ram.trackDirtyPages(true);
      write(rig);
      rig.run(500 + random.below(5000));
      saved = rig.saveDifference(folder, saved);
      using restored = await Rig.create(SCATTERING, MEMORY, saved);
      expect(restored.memory.equals(rig.memory), hint).toBe(true);
    }
    // What was written to machines made of a file is theirs.
    using again = await Rig.create(SCATTERING, MEMORY, base);
    expect(again.memory.equals(first.memory)).toBe(true);
    closeLayers(saved);
  });

  test('nothing written is nothing saved', async () => {
    using rig = await Rig.create(SCATTERING, MEMORY);
    rig.machine.ram.trackDirtyPages(true);
    const base = rig.save(folder);
    expect(rig.saveDifference(folder, base).layers.at(-1)?.extents).toEqual([]);
    rig.machine.ram.memory.writeU8(5 * MiB, 1);
    const { layers } = rig.saveDifference(folder, base);
    expect(layers.at(-1)?.extents).toEqual([[(5 * MiB) / 4096, 1]]);
  });
});
