import { text } from 'node:stream/consumers';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, describe, expect, test } from 'vitest';
import { detectKvmFlavour } from '#dist/arch/x86_64/assist/detect.js';
import { Machine, type MachineConfig, SharedThread } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { talkingGuest } from '../support/talking-guest.js';

const MiB = 2 ** 20;
const GiB = 2 ** 30;

/** Resolves when the guest has done port I/O more than so many times. */
const exits = (machine: Machine, count: number) =>
  expect.poll(async () => (await machine.metrics()).exits.io ?? 0, { timeout: 30_000 }).toBeGreaterThan(count);

const thread = new SharedThread();
afterAll(() => thread.close());

/** Who runs a machine's vCPU, and its devices. */
const MODES: [string, (config: MachineConfig) => Promise<Machine>][] = [
  ['its vCPU inline', (config) => Machine.create(config)],
  ['a thread for its vCPU', (config) => Machine.create({ ...config, vcpuThreads: true })],
  ['a thread that it shares', (config) => Machine.create(config, { thread })],
];

describe.each(MODES)('with %s', (_, create) => {
  async function runToEnd(assembly: string, config: Partial<MachineConfig> = {}) {
    await using machine = await create({ kernel: guestProgram(assembly), memory: 4 * MiB, ...config });
    await machine.start();
    return await machine.wait();
  }

  describeKvm('how a machine ends', () => {
    test('the guest chooses an exit code', async () => {
      expect(await runToEnd('mov al, 42; out DEBUG_EXIT, al')).toMatchObject({ reason: 'guest-exit', code: 42 });
    });

    test('the guest powers off', async () => {
      const end = await runToEnd('mov dx, SLEEP_CONTROL; mov al, 0x34; out dx, al');
      expect(end).toMatchObject({ reason: 'guest-shutdown', code: 0 });
    });

    test('the guest resets and onReset is end', async () => {
      const end = await runToEnd('mov al, 0xfe; out I8042, al', { onReset: 'end' });
      expect(end).toMatchObject({ reason: 'guest-reset', code: null });
    });

    test('a reset boots again: memory is new, the milestone of the first boot stays', async () => {
      // The CMOS-less way to know a second boot: the host types a byte only after the first has reset.
      const path = guestProgram(`
      mov al, 1
      out BOOT_TIMER, al
      mov dx, SERIAL + 3
      mov al, 3
      out dx, al
      mov dx, SERIAL
      mov al, 'B'
      out dx, al
      cmp byte ptr [0x200000], 0
      jne stale
      mov byte ptr [0x200000], 1
      mov dx, SERIAL + 5
      mov ecx, 100
    poll:
      in al, dx
      test al, 1
      jnz typed
      dec ecx
      jnz poll
      mov al, 0xfe
      out I8042, al
    typed:
      mov al, 7
      out DEBUG_EXIT, al
    stale:
      mov al, 99
      out DEBUG_EXIT, al`);
      await using machine = await create({ kernel: path, memory: 4 * MiB });
      let boots = 0;
      machine.serial.on('data', (chunk: Buffer) => {
        for (const byte of chunk) if (byte === 0x42 && ++boots === 3) machine.serial.write('x');
      });
      await machine.start();
      expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 7 });
      expect(boots).toBeGreaterThanOrEqual(3);
    });

    test('the guest’s CPU shuts down', async () => {
      expect(await runToEnd('ud2')).toMatchObject({ reason: 'triple-fault', code: null });
    });

    test.runIf(detectKvmFlavour() === 'interpreted')('an instruction that nothing can complete is shown', async () => {
      const end = await runToEnd('vpermd ymm1, ymm2, ymm3');
      expect(end.reason).toBe('guest-instruction');
      expect(end.message).toMatch(/0x100000: c4 e2 6d 36 cb \(vpermd /);
    });

    for (const [name, assembly] of [
      ['spins', 'again: jmp again'],
      ['halts with interrupts off', 'cli; hlt'],
      ['does port I/O for ever', 'again: in al, 0x80; jmp again'],
    ] as const) {
      test(`the host stops a guest that ${name}`, async () => {
        await using machine = await create({ kernel: guestProgram(assembly), memory: 4 * MiB });
        await machine.start();
        await delay(50);
        expect(await machine.stop()).toMatchObject({ reason: 'stopped' });
        expect((await machine.metrics()).state).toBe('ended');
        await expect(machine.start()).rejects.toMatchObject({ code: 'ERR_MACHINE_STATE' });
      });
    }
  });

  describeKvm('a machine', () => {
    test('pauses, resumes and is asked', async () => {
      const spin = guestProgram('again: in al, 0x80; jmp again');
      await using machine = await create({ kernel: spin, memory: 4 * MiB });
      expect((await machine.metrics()).state).toBe('created');
      await expect(machine.pause()).rejects.toMatchObject({ code: 'ERR_MACHINE_STATE' });
      await expect(machine.resume()).rejects.toMatchObject({ code: 'ERR_MACHINE_STATE' });
      await machine.start();
      await expect(machine.start()).rejects.toThrow('the machine is running, not created: it cannot start');
      await exits(machine, 10);
      await machine.pause();
      const before = await machine.metrics();
      await delay(50);
      const after = await machine.metrics();
      expect(before.state).toBe('paused');
      expect(after.exits).toEqual(before.exits);
      await machine.resume();
      await exits(machine, before.exits.io as number);
    });

    test('has more than 4 GiB of memory around the MMIO hole', async () => {
      // 5 GiB of RAM: 0 to 3, 4 to 6. The identity map ends at 4: the guest maps the first and the last 2 MiB beyond it.
      const end = await runToEnd(
        `
      mov qword ptr [0xa000 + 4 * 8], 0x200003
      mov qword ptr [0xa000 + 5 * 8], 0x201003
      mov rax, 0x100000083
      mov qword ptr [0x200000], rax
      mov rax, 0x17fe00083
      mov qword ptr [0x201000 + 511 * 8], rax
      mov rax, cr3
      mov cr3, rax
      mov rbx, 0x100000000
      mov rcx, 0x1122334455667788
      mov [rbx], rcx
      mov rdx, 0x17ffffff8
      mov [rdx], rbx
      mov esi, 0xbffffff8
      mov [rsi], rdx
      mov al, 1
      cmp [rbx], rcx
      jne done
      mov al, 2
      cmp [rdx], rbx
      jne done
      mov al, 3
      cmp [rsi], rdx
      jne done
      mov al, 4
      mov esi, 0xd0000000
      cmp dword ptr [rsi], -1
      jne done
      mov al, 5
      cmp dword ptr [0], 0x11223344
      je done
      mov al, 0
    done:
      out DEBUG_EXIT, al`,
        { memory: 5 * GiB },
      );
      expect(end).toMatchObject({ reason: 'guest-exit', code: 0 });
    });

    test('enters an ELF with a PVH note in 32-bit mode, with its start info and command line', async () => {
      // Xen's start_info: magic at 0, version at 4, cmdline_paddr at 24.
      const end = await runToEnd(
        `
      .code32
      mov al, 1
      cmp dword ptr [ebx], 0x336ec578
      jne done
      mov al, 2
      mov ecx, cr0
      test ecx, 0x80000000
      jnz done
      mov al, 3
      mov esi, [ebx + 24]
    next:
      inc esi
      cmp byte ptr [esi], 0
      je done
      cmp dword ptr [esi], 0x21687670
      jne next
      mov al, 0
    done:
      out DEBUG_EXIT, al
      .section .note.Xen, "a", @note
      .align 4
      .long 4, 4, 18
      .asciz "Xen"
      .long _start`,
        { append: 'pvh!', memory: 8 * MiB },
      );
      expect(end).toMatchObject({ reason: 'guest-exit', code: 0 });
    });

    test('prints through its serial stream to the last byte, however slowly it is read', async () => {
      const count = 20_000;
      const path = talkingGuest(count, 0);
      await using machine = await create({ kernel: path, memory: 4 * MiB });
      await machine.start();
      await delay(100);
      const printed = Buffer.from(await text(machine.serial.setEncoding('latin1')), 'latin1');
      expect(printed.length).toBe(count);
      expect(printed.every((byte, i) => byte === (i & 0xff))).toBe(true);
      expect(await machine.wait()).toMatchObject({ code: 0 });
    });

    test('string port I/O reaches the device byte by byte', async () => {
      const path = guestProgram(`
      mov dx, SERIAL
      lea rsi, [rip + message]
      mov ecx, 5
      rep outsb
      mov al, 0
      out DEBUG_EXIT, al
    message: .ascii "hello"`);
      await using machine = await create({ kernel: path, memory: 4 * MiB });
      await machine.start();
      expect(await text(machine.serial)).toBe('hello');
    });

    test('rejects a configuration by field', async () => {
      const kernel = '/nonexistent/vmlinux';
      await expect(create({ kernel: '' })).rejects.toMatchObject({ code: 'ERR_USAGE' });
      await expect(create({ kernel, memory: 5000 })).rejects.toThrow(/^memory: 5000/);
      await expect(create({ kernel, memory: 4096 })).rejects.toMatchObject({ code: 'ERR_MEMORY' });
      await expect(create({ kernel, cpus: 0 })).rejects.toThrow(/^cpus: 0/);
      await expect(create({ kernel })).rejects.toMatchObject({ code: 'ERR_IMAGE' });
    });

    test('several run at once in one process', async () => {
      const program = (code: number) =>
        `mov ecx, 2000\nagain: in al, 0x80\nloop again\nmov al, ${code}\nout DEBUG_EXIT, al`;
      const ends = await Promise.all([11, 22, 33, 44].map((code) => runToEnd(program(code))));
      expect(ends.map((end) => end.code)).toEqual([11, 22, 33, 44]);
    });
  });

  describeKvm('200 machines in one process', () => {
    test('leave descriptors, threads, mappings and memory where they were', { timeout: 300_000 }, async () => {
      const assembly = 'mov byte ptr [0x200000], 1; mov al, 0; out DEBUG_EXIT, al';
      const cycle = async (i: number) => {
        // Some end by themselves, some are stopped, some are never started, some fail to build.
        if (i % 4 === 3) {
          await expect(create({ kernel: '/nonexistent' })).rejects.toThrow();
          return;
        }
        const consolePorts = [{ name: 'hvc0', console: true }, { name: 'port' }];
        await using machine = await create({ kernel: guestProgram(assembly), memory: 8 * MiB, consolePorts });
        if (i % 4 === 0) return;
        await machine.start();
        if (i % 4 === 1) await machine.stop();
        else await machine.wait();
      };
      for (let i = 0; i < 20; i++) await cycle(i);
      Machine.keepWarm(0); // what waits for a machine is no leak
      const before = resources();
      Machine.keepWarm(1);
      for (let i = 0; i < 200; i++) await cycle(i);
      Machine.keepWarm(0);
      await expectNoMoreThan(before);
      const after = resources();
      // The allocators of V8 and libc keep some of what they once had; machines would leave three mappings each at the least.
      expect(after.mappings).toBeLessThan(before.mappings + 300);
      expect(after.rssBytes).toBeLessThan(before.rssBytes + 64 * MiB);
    });
  });
});
