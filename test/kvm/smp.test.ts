import { mkdtempSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Machine, SharedThread } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { parallelGuest, smpGuest } from '../support/smp-guest.js';
import { temporaryFolder } from '../support/temporary-folder.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const memory = 4 * 2 ** 20;
const EXIT = 'mov al, 7; out DEBUG_EXIT, al';

/** For ever: prints a letter each time that every other processor has counted on. */
const tellThatAllCount = (cpus: number) => `
    mov ebx, 1
  again:
    mov eax, [0x71000 + rbx * 4]
  unchanged:
    in al, 0x80
    mov ecx, [0x71000 + rbx * 4]
    cmp ecx, [0x71800]
    je unchanged
    mov [0x71800], ecx
    inc ebx
    cmp ebx, ${cpus}
    jb again
    mov dx, SERIAL
    mov al, 'c'
    out dx, al
    mov ebx, 1
    jmp again`;

/** Resolves when the guest has said so many letters more. */
async function counts(machine: Machine, letters: number): Promise<void> {
  for await (const chunk of machine.serial.iterator({ destroyOnReturn: false })) {
    letters -= (chunk as Buffer).length;
    if (letters <= 0) return;
  }
  throw new Error('the guest ended');
}

describeKvm('a machine of several vCPUs', () => {
  test.each([2, 4, 9])('%i start by INIT and SIPI, and all run', async (cpus) => {
    await using machine = await Machine.create({ kernel: smpGuest(cpus, EXIT), memory, cpus });
    await machine.start();
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 7 });
  });

  test('exclude each other in locked instructions, those of 16 bytes too', async () => {
    const cpus = 4;
    // Those of even numbers add 1 to both halves of a number, 2000 times, the others to its lower half by themselves.
    const each = `
      mov r8d, 2000
      test edi, 1
      jz once_more
    lower_half:
      lock inc qword ptr [0x72000]
      dec r8d
      jnz lower_half
      jmp finished
    once_more:
      mov rax, [0x72000]
      mov rdx, [0x72008]
    again:
      lea rbx, [rax + 1]
      lea rcx, [rdx + 1]
      lock cmpxchg16b [0x72000]
      jnz again
      dec r8d
      jnz once_more
      jmp finished`;
    const then = `
      mov al, 1
      cmp qword ptr [0x72000], ${2000 * cpus}
      jne told
      cmp qword ptr [0x72008], ${1000 * cpus}
      jne told
      mov al, 0
    told:
      out DEBUG_EXIT, al`;
    await using machine = await Machine.create({ kernel: parallelGuest(cpus, each, then), memory, cpus });
    await machine.start();
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 0 });
  });

  test('stand still when it is paused, and go on', async () => {
    const cpus = 3;
    await using machine = await Machine.create({ kernel: smpGuest(cpus, tellThatAllCount(cpus)), memory, cpus });
    await machine.start();
    for (let round = 0; round < 20; round++) {
      await counts(machine, 3);
      await machine.pause();
      const before = (await machine.metrics()).exits;
      await new Promise((resolve) => setTimeout(resolve, 5));
      expect((await machine.metrics()).exits).toEqual(before);
      await machine.resume();
    }
    expect(await machine.stop()).toMatchObject({ reason: 'stopped' });
  });

  test('start anew after a reset', async () => {
    const cpus = 2;
    // The other processor is in the middle of its exits when this one resets.
    const reset = 'mov al, 0xfe; out I8042, al; hang: jmp hang';
    await using machine = await Machine.create({ kernel: smpGuest(cpus, reset), memory, cpus });
    let resets = 0;
    const enough = new Promise<void>((resolve) => {
      machine.on('reset', () => {
        if (++resets === 5) resolve();
      });
    });
    await machine.start();
    await enough;
    await machine.stop();
  });

  test('are saved and restored, time and again', async () => {
    const cpus = 3;
    const folder = mkdtempSync(join(temporaryFolder(), 'smp-'));
    let machine = await Machine.create({ kernel: smpGuest(cpus, tellThatAllCount(cpus)), memory, cpus });
    try {
      await machine.start();
      for (let round = 0; round < 10; round++) {
        await counts(machine, 2);
        const path = join(folder, `${round}`);
        await machine.snapshot(path, { stop: true });
        await machine.close();
        machine = await Machine.restore(path);
        await machine.resume();
      }
      await counts(machine, 2);
    } finally {
      await machine.close();
    }
  });

  test('fork, on a thread that both share with others', async () => {
    const cpus = 2;
    await using thread = new SharedThread();
    const config = { kernel: smpGuest(cpus, tellThatAllCount(cpus)), memory, cpus };
    await using machine = await Machine.create(config, { thread });
    await using other = await Machine.create(config, { thread });
    await Promise.all([machine.start(), other.start()]);
    await counts(machine, 2);
    await using fork = await machine.fork({ thread });
    expect(thread.machines).toBe(3);
    await fork.resume();
    await Promise.all([counts(machine, 5), counts(other, 5), counts(fork, 5)]);
  });

  test('leave nothing behind, whatever they were doing', { timeout: 120_000 }, async () => {
    const kernel = smpGuest(2, tellThatAllCount(2));
    const cycle = async (round: number) => {
      await using machine = await Machine.create({ kernel, memory, cpus: 2 });
      if (round % 3 === 0) return;
      await machine.start();
      if (round % 3 === 1) await counts(machine, 1);
    };
    for (let round = 0; round < 6; round++) await cycle(round);
    const before = resources();
    for (let round = 0; round < 30; round++) await cycle(round);
    await expectNoMoreThan(before);
  });
});
