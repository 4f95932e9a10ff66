import { mkdtempSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { detectKvmFlavour } from '#dist/arch/x86_64/assist/detect.js';
import { Machine, type MachineConfig, SharedThread } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { stateIn } from '../support/snapshot/folder.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const RING = 0x30_0000;
const AVAIL_EVENT = RING + 0x200 + 4 + 8 * 8;

/**
 * A driver for the first virtio device, with EVENT_IDX and a queue of 8; its interrupts go nowhere. `request` has one buffer
 * of 8 bytes filled and waits for that; it notifies only when it is asked to. r12d counts requests. Before each it idles, for
 * anything between nothing and some hundred microseconds.
 */
const DRIVER = `
.set REGISTERS, 0xd0000000
.set RING, ${RING}             # descriptors; available ring at +0x100; used ring at +0x200
.macro reg offset, value
  mov dword ptr [rbp + \\offset], \\value
.endm
  mov esp, 0x2ff000
  mov ebp, REGISTERS
  mov r13d, 2463534242
  jmp main

initialize:
  reg 0x70, 0
  reg 0x70, 3
  reg 0x24, 1
  reg 0x20, 1                  # VERSION_1
  reg 0x24, 0
  reg 0x20, 0x20000000         # EVENT_IDX
  reg 0x70, 11
  mov edi, RING
  xor eax, eax
  mov ecx, 0x300 / 4
  rep stosd
  mov dword ptr [RING], 0x302000
  mov dword ptr [RING + 8], 8
  mov dword ptr [RING + 12], 2 # the device writes
  reg 0x30, 0
  reg 0x38, 8
  reg 0x80, RING
  reg 0x90, RING + 0x100
  reg 0xa0, RING + 0x200
  reg 0x44, 1
  reg 0x70, 15
  xor r12d, r12d
  ret

idle:
  mov eax, r13d                # xorshift
  shl eax, 13
  xor r13d, eax
  mov eax, r13d
  shr eax, 17
  xor r13d, eax
  mov eax, r13d
  shl eax, 5
  xor r13d, eax
  mov ecx, r13d
  and ecx, IDLE
  jz request
idling:
  pause
  dec ecx
  jnz idling

request:
  mov eax, r12d
  inc r12d
  mov word ptr [RING + 0x102], r12w
  lock or dword ptr [rsp - 64], 0
  cmp ax, word ptr [${AVAIL_EVENT}]
  jne wait
  reg 0x50, 0
wait:
  cmp r12w, word ptr [RING + 0x202]
  jne wait
  ret

main:
  call initialize
`;

/** Prints a letter after each 256 requests, for ever. */
const FOREVER = `
again:
  call idle
  test r12d, 0xff
  jnz again
  mov dx, SERIAL
  mov al, 'c'
  out dx, al
  jmp again`;

const EXIT = `
  mov al, 0
  out DEBUG_EXIT, al`;

/** Turns of `idling` at most: half as long on average as the machine thread looks for, or several times as long. */
const TURNS = detectKvmFlavour() === 'interpreted' ? 16 : 1024;
const SHORT = TURNS - 1;
const LONG = 8 * TURNS - 1;

const config = (idle: number, assembly: string, more: Partial<MachineConfig> = {}): MachineConfig => ({
  ...{ kernel: guestProgram(`.set IDLE, ${idle}\n${DRIVER}${assembly}`), memory: 4 * 2 ** 20, vcpuThreads: true },
  rng: { bytesPerSecond: 1e9 },
  ...more,
});

/** Resolves when the guest has said so many letters more. */
async function letters(machine: Machine, count: number): Promise<void> {
  for await (const chunk of machine.serial.iterator({ destroyOnReturn: false })) {
    count -= (chunk as Buffer).length;
    if (count <= 0) return;
  }
  throw new Error('the guest ended');
}

describeKvm('a queue that the machine thread polls while vCPUs run', () => {
  test.each([
    ['short', SHORT],
    ['long', LONG],
  ])('loses no request after %s pauses, and no notification is an exit to it', async (_, idle) => {
    const requests = 5000;
    const until = `
    again:
      call idle
      cmp r12d, ${requests}
      jne again
      ${EXIT}`;
    await using machine = await Machine.create(config(idle, until));
    await machine.start();
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 0 });
    const { devices, exits } = await machine.metrics();
    const { notifications = 0, polled = 0 } = devices.rng as Record<string, number>;
    expect(notifications + polled).toBeGreaterThanOrEqual(requests);
    expect(exits.mmio).toBeLessThan(50);
  });

  test('comes and goes with its driver', async () => {
    const reinitialize = `
    again:
      call idle
      cmp r12d, 50
      jne again
      inc r14d
      cmp r14d, 40
      je finished
      call initialize
      jmp again
    finished:
      ${EXIT}`;
    await using machine = await Machine.create(config(SHORT, reinitialize));
    await machine.start();
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 0 });
  });

  test('comes and goes with the machine’s resets', async () => {
    const reset = `
    again:
      call idle
      cmp r12d, 50
      jne again
      mov al, 0xfe
      out I8042, al
      jmp again`;
    await using machine = await Machine.create(config(SHORT, reset));
    let resets = 0;
    const enough = new Promise<void>((resolve) => {
      machine.on('reset', () => {
        if (++resets === 10) resolve();
      });
    });
    await machine.start();
    await enough;
    await machine.stop();
  });

  test('of which the index is absurd stops its device', async () => {
    const absurd = `
      call request
      mov word ptr [RING + 0x102], 1000
      reg 0x50, 0
    still_well:
      mov eax, [rbp + 0x70]
      test al, 0x40              # DEVICE_NEEDS_RESET
      jz still_well
      mov word ptr [RING + 0x102], 2000
      call initialize
      call request
      ${EXIT}`;
    await using machine = await Machine.create(config(SHORT, absurd));
    await machine.start();
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 0 });
  });

  test('is, when its machine is paused or saved, as if it were not polled; and goes on after it', async () => {
    await using thread = new SharedThread();
    const folder = mkdtempSync(join(temporaryFolder(), 'polled-'));
    let machine = await Machine.create(config(SHORT, FOREVER, { vcpuThreads: false }), { thread });
    try {
      await machine.start();
      for (let round = 0; round < 8; round++) {
        await letters(machine, 2);
        await machine.pause();
        const paths = [join(folder, `${round}-a`), join(folder, `${round}-b`)] as const;
        for (const path of paths) await machine.snapshot(path);
        const [first, second] = paths.map((path) => readFileSync(join(path, 'memory'))) as [Buffer, Buffer];
        expect(first.equals(second)).toBe(true);
        const [queue] = stateIn(paths[0]).machine.devices.mmio['virtio rng'].queues;
        expect(first.readUInt16LE(AVAIL_EVENT)).toBe(queue.nextAvailable);
        await machine.resume();
        await letters(machine, 1);
        await machine.close();
        // With the vCPU on the machine thread, where it is polled by nobody, and then again on its own.
        machine = await Machine.restore(paths[1], round % 2 ? { thread } : {});
        await machine.resume();
        await letters(machine, 1);
        if (round % 2 === 0) continue;
        await using fork = await machine.fork({ thread });
        await fork.resume();
        await Promise.all([letters(machine, 2), letters(fork, 2)]);
      }
    } finally {
      await machine.close();
    }
  });

  test('keeps no other machine of the thread from its own', async () => {
    await using thread = new SharedThread();
    const busy = config(0, FOREVER);
    await using one = await Machine.create(busy, { thread });
    await using two = await Machine.create(busy, { thread });
    await using three = await Machine.create(config(LONG, FOREVER), { thread });
    const machines = [one, two, three];
    await Promise.all(machines.map((machine) => machine.start()));
    await Promise.all(machines.map((machine) => letters(machine, 3)));
    for (const machine of machines) expect(await machine.stop()).toMatchObject({ reason: 'stopped' });
  });
});
