import { once } from 'node:events';
import { expect, test } from 'vitest';
import { type DeviceModule, Machine, type MachineEnd } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const PROBE = 'test/support/devices/probe.js';
const WRONG = 'test/support/devices/wrong.js';

/** A guest that counts interrupts: level-triggered ones of the first MMIO device in ebx, edges of the second in ecx. */
const PRELUDE = `
.set FIRST, 0xd1000000
.set SECOND, 0xd1001000
.set IDT, 0x310000
.set LAPIC, 0xfee00000
.set IOAPIC, 0xfec00000
  mov esp, 0x2ff000
  jmp main

.macro gate vector, handler
  lea rax, [rip + \\handler]
  mov edi, IDT + 16 * \\vector
  mov word ptr [rdi], ax
  mov dword ptr [rdi + 2], 0x8e000010
  shr rax, 16
  mov word ptr [rdi + 6], ax
  shr rax, 16
  mov qword ptr [rdi + 8], rax
.endm
.macro ioapic register, value
  mov dword ptr [rbp], \\register
  mov dword ptr [rbp + 0x10], \\value
.endm

.macro end_of_interrupt
  mov edx, LAPIC
  mov dword ptr [rdx + 0xb0], 0
  pop rdx
  iretq
.endm

level_handler:                 # lowers the line before it ends the interrupt
  push rdx
  inc ebx
  mov edx, FIRST
  mov dword ptr [rdx + 4], 0
  end_of_interrupt

edge_handler:
  push rdx
  inc ecx
  end_of_interrupt

idtr:
  .word 0xfff
  .quad IDT

.macro interrupts              # pin 23: level, vector 0x40; pin 22: edge, vector 0x41
  gate 0x40, level_handler
  gate 0x41, edge_handler
  lidt [rip + idtr]
  mov ebp, LAPIC
  mov dword ptr [rbp + 0xf0], 0x1ff
  mov ebp, IOAPIC
  ioapic 0x3f, 0
  ioapic 0x3e, 0x8040
  ioapic 0x3d, 0
  ioapic 0x3c, 0x41
  xor ebx, ebx
  xor ecx, ecx
  sti
.endm
main:
`;

async function run(
  assembly: string,
  devices: readonly DeviceModule[],
  during: (machine: Machine) => unknown = () => {},
): Promise<MachineEnd> {
  const kernel = guestProgram(PRELUDE + assembly);
  await using machine = await Machine.create({ kernel, memory: 4 << 20, serial: false, devices });
  await during(machine);
  await machine.start();
  return await machine.wait();
}

const exit = '\n  out DEBUG_EXIT, al\n';

describeKvm('a bare guest with devices of the program', () => {
  const probe = { module: PROBE, name: 'probe' };
  const edge = { module: PROBE, name: 'edge', export: 'EdgeProbe' };

  test('has them where the program is told', async () => {
    await run(exit, [probe, edge], (machine) => {
      const places = ['probe', 'edge'].map((name) => machine.device(name)).map((d) => [d.address, d.interrupt]);
      expect(places).toEqual([
        [0xd100_0000, 23],
        [0xd100_1000, 22],
      ]);
      expect(() => machine.device('none')).toThrow(/no device 'none'; this machine has probe, edge/);
    });
  });

  test('is interrupted by level, by edge, and by a timer', async () => {
    const end = await run(
      `
  interrupts
  mov edx, FIRST
  mov dword ptr [rdx], 1       # level: comes once, since the handler lowers it
  mov dword ptr [rdx], 1
  mov edx, SECOND
  mov dword ptr [rdx + 8], 1   # three pulses
  mov dword ptr [rdx + 8], 1
  mov dword ptr [rdx + 8], 1
  mov edx, FIRST
  cli
  mov dword ptr [rdx + 0x14], 2000
  sti
  hlt
  cli
  lea eax, [rbx + 8 * rcx]
  ${exit}`,
      [probe, edge],
    );
    expect(end).toMatchObject({ reason: 'guest-exit', code: 3 + 8 * 3 });
  });

  test('hears from the program before it starts', async () => {
    const end = await run(`mov edx, FIRST\n mov eax, [rdx + 8] ${exit}`, [probe], (machine) =>
      machine.device('probe').postMessage(77),
    );
    expect(end.code).toBe(77);
  });

  test('has them know its memory, and the errors of that, by the public classes', async () => {
    const end = await run(`mov edx, FIRST\n mov eax, [rdx + 0x10] ${exit}`, [probe]);
    expect(end.code).toBe(1);
  });

  test('that resets itself resets the devices, which stay the same', async () => {
    const end = await run(
      `
  mov edx, FIRST
  mov eax, [rdx]
  cmp al, 3
  je done
  mov dword ptr [rdx], 1       # an interrupt is not carried over
  mov al, 0xfe
  out I8042, al
  hlt
done:
  interrupts
  nop
  nop
  cli
  shl ebx, 4
  add al, bl
  mov edx, FIRST
  mov eax, [rdx]
  add eax, ebx
  ${exit}`,
      [probe, edge],
    );
    expect(end.code).toBe(3);
  });

  test('finds ones at a device that threw, while the others go on; the program is told', async () => {
    let failure: Promise<unknown[]> | undefined;
    const end = await run(
      `
  mov edx, FIRST
  mov dword ptr [rdx + 0x10], 5
  mov eax, [rdx]
  inc eax
  mov edx, SECOND
  add eax, [rdx]
  add eax, 9
  ${exit}`,
      [probe, edge],
      (machine) => {
        failure = once(machine.device('probe'), 'failed');
      },
    );
    expect(end.code).toBe(9);
    expect(await failure).toMatchObject([
      {
        code: 'ERR_DEVICE',
        message: expect.stringMatching(/^device 'probe' threw Error: the guest wrote 5 \(at Probe/),
      },
    ]);
  });

  test('cannot flood the program: what is not taken is refused, and the device hears when there is room', async () => {
    const flood = `
  mov edx, FIRST
  mov dword ptr [rdx + 0xc], 10000
again:
  mov eax, [rdx + 8]
  test eax, eax
  jz again
  mov eax, [rdx + 4]
  cmp eax, 10000 - 1024
  jne wrong
  mov eax, [rdx + 0xc]
  ${exit}
wrong:
  mov al, 99
  ${exit}`;
    const got: unknown[] = [];
    const end = await run(flood, [probe], (machine) => {
      const device = machine.device('probe');
      void (async () => {
        for await (const value of device) {
          got.push(value);
          if (got.length === 1024) device.postMessage(1);
        }
      })();
    });
    expect(end.code).toBe(1);
    expect(got).toEqual(Array.from({ length: 1024 }, (_, n) => n));
  });

  test('is not made with a device that cannot be had, and nothing of it is left', async () => {
    const kernel = guestProgram(exit);
    const create = (device: DeviceModule) => Machine.create({ kernel, memory: 4 << 20, devices: [device] });
    const attempt = async () => {
      await expect(create({ module: WRONG, export: 'Throws' })).rejects.toMatchObject({
        code: 'ERR_DEVICE',
        message: expect.stringMatching(/^device 'wrong' \(file:.*wrong.js\): its constructor threw RangeError/),
      });
      await expect(create({ module: 'missing.js' })).rejects.toMatchObject({ code: 'ERR_DEVICE' });
      // Timers made, nothing run.
      const machine = await create(probe);
      await machine.close();
      machine.device('probe').postMessage('to nobody');
    };
    await attempt();
    const before = resources();
    for (let n = 0; n < 3; n++) await attempt();
    await expectNoMoreThan(before);
  });
});
