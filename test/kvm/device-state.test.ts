import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { setTimeout as delay } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { Machine, type MachineConfig } from '#dist/index.js';
import { Regs } from '#dist/kvm/registers.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
let count = 0;
const fresh = () => join(folder, String(count++));

const probe = { module: 'test/support/devices/probe.js', name: 'probe' };
const tape = { module: 'test/support/devices/tape.js', name: 'tape' };

function create(assembly: string, config: Partial<MachineConfig> = {}): Promise<Machine> {
  return Machine.create({ kernel: guestProgram(assembly), memory: 4 << 20, ...config });
}

/** rcx as it was saved. */
function savedCounter(path: string): number {
  const state = readFileSync(join(path, 'state'), 'utf8');
  const { regs } = JSON.parse(state.slice(state.indexOf('\n') + 1)).machine.vcpus[0];
  return Number(new Regs(new BigUint64Array(new Uint8Array(Buffer.from(regs, 'base64')).buffer)).gpr(1));
}

/**
 * Raises a level-triggered line while interrupts are off, tells the program, and waits for its word. The handler lets
 * the line up until the tenth interrupt: the second comes only if the line is up. The exit code is 1 if all ten come.
 */
const lineGuest = (pin: number, raise: string, lower: string) => `
.set PROBE, 0xd1000000
.set IDT, 0x310000
.set LAPIC, 0xfee00000
.set IOAPIC, 0xfec00000
.macro ioapic register, value
  mov dword ptr [rbp], \\register
  mov dword ptr [rbp + 0x10], \\value
.endm
.macro reg offset, value
  mov dword ptr [rbp + \\offset], \\value
.endm
  mov esp, 0x2ff000
  lea rax, [rip + handler]
  mov edi, IDT + 16 * 0x40
  mov word ptr [rdi], ax
  mov dword ptr [rdi + 2], 0x8e000010
  shr rax, 16
  mov word ptr [rdi + 6], ax
  shr rax, 16
  mov qword ptr [rdi + 8], rax
  lidt [rip + idtr]
  mov al, 0xff                 # the PICs, which have the ISA's lines too, say nothing
  out 0x21, al
  out 0xa1, al
  mov ebp, LAPIC
  mov dword ptr [rbp + 0xf0], 0x1ff
  mov ebp, IOAPIC
  ioapic ${0x11 + 2 * pin}, 0
  ioapic ${0x10 + 2 * pin}, 0x8040
  xor ebx, ebx
  ${raise}
  mov esi, PROBE
  mov dword ptr [rsi + 0xc], 1
listen:
  mov eax, [rsi + 8]
  test eax, eax
  jz listen
  sti
  mov ecx, 20000
again:
  cmp ebx, 10
  jae settled
  loop again
settled:
  cmp ebx, 10
  setae al
  out DEBUG_EXIT, al
  hlt
handler:
  push rax
  push rdx
  push rbp
  inc ebx
  cmp ebx, 10
  jb end_of_interrupt
  ${lower}
end_of_interrupt:
  mov edx, LAPIC
  mov dword ptr [rdx + 0xb0], 0
  pop rbp
  pop rdx
  pop rax
  iretq
idtr:
  .word 0xfff
  .quad IDT`;

const ENTROPY_REQUEST = `
  mov ebp, 0xd0000000
  reg 0x70, 3
  reg 0x24, 1
  reg 0x20, 1                  # VERSION_1
  reg 0x70, 11
  reg 0x30, 0
  reg 0x38, 8
  reg 0x80, 0x300000
  reg 0x90, 0x300100
  reg 0xa0, 0x300200
  reg 0x44, 1
  reg 0x70, 15
  mov dword ptr [0x300000], 0x301000
  mov dword ptr [0x300008], 16
  mov dword ptr [0x30000c], 2
  mov word ptr [0x300102], 1
  reg 0x50, 0`;

describeKvm('a line that is up when its machine is saved is up in the restored one', () => {
  test.each<[string, number, string, string]>([
    ['virtio', 5, ENTROPY_REQUEST, 'mov ebp, 0xd0000000\n reg 0x64, 1'],
    [
      'UART',
      4,
      'mov dx, SERIAL + 4\n mov al, 8\n out dx, al\n mov dx, SERIAL + 1\n mov al, 2\n out dx, al',
      'mov dx, SERIAL + 2\n in al, dx',
    ],
    ['MMIO', 23, 'mov esi, 0xd1000000\n mov dword ptr [rsi], 1', 'mov edx, PROBE\n mov dword ptr [rdx + 4], 0'],
  ])('%s', async (_, pin, raise, lower) => {
    const path = fresh();
    await using machine = await create(lineGuest(pin, raise, lower), { rng: true, devices: [probe] });
    const told = once(machine.device('probe'), 'message');
    await machine.start();
    await told;
    await machine.snapshot(path);
    // The machine itself tells that the guest does what it says.
    machine.device('probe').postMessage(1);
    expect(await machine.wait()).toMatchObject({ code: 1 });
    await using restored = await Machine.restore(path, { devices: [probe] });
    await restored.resume();
    restored.device('probe').postMessage(1);
    expect(await restored.wait()).toMatchObject({ code: 1 });
  });
});

describeKvm('a machine is saved in the middle of a string instruction', () => {
  test('that writes to a port: every byte comes once, in order', async () => {
    const LENGTH = 20_000;
    const path = fresh();
    await using machine = await create(`
      mov edi, 0x200000
      mov ecx, ${LENGTH}
      xor eax, eax
    fill:
      mov [rdi], al
      add al, 7
      inc rdi
      loop fill
      mov esi, 0x200000
      mov ecx, ${LENGTH}
      mov dx, SERIAL
      rep outsb
      mov al, 5
      out DEBUG_EXIT, al
      hlt`);
    const parts: Buffer[] = [];
    const { serial } = machine;
    const some = new Promise<void>((resolve) => {
      serial.on('data', (chunk: Buffer) => {
        parts.push(chunk);
        if (Buffer.concat(parts).length > LENGTH / 10) resolve();
      });
    });
    await machine.start();
    await some;
    const ended = once(serial, 'end');
    await machine.snapshot(path, { stop: true });
    await ended;
    expect(savedCounter(path)).toBeGreaterThan(0);
    expect(savedCounter(path)).toBeLessThan(LENGTH);
    await using restored = await Machine.restore(path);
    const rest = text(restored.serial.setEncoding('latin1'));
    await restored.resume();
    expect((await restored.wait()).code).toBe(5);
    const all = Buffer.concat([...parts, Buffer.from(await rest, 'latin1')]);
    expect(all.length).toBe(LENGTH);
    expect(
      Buffer.compare(
        all,
        Buffer.alloc(LENGTH).map((_, i) => 7 * i),
      ),
    ).toBe(0);
  });

  test('that reads from a port: memory and registers are as if nothing had been', async () => {
    const LENGTH = 0x10_0000;
    const path = fresh();
    await using machine = await create(`
      mov al, 1
      out BOOT_TIMER, al
      mov edi, 0x200000
      mov ecx, ${LENGTH}
      mov edx, 0x60
      rep insb
      mov al, 1
      test ecx, ecx
      jnz done
      mov al, 2
      cmp edi, ${0x20_0000 + LENGTH}
      jne done
      mov edi, 0x200000
      mov ecx, ${LENGTH}
      mov al, 0xff
      repe scasb
      mov al, 3
      jne done
      cmp byte ptr [rdi], 0
      jne done
      mov al, 4
    done:
      out DEBUG_EXIT, al
      hlt`);
    await machine.start();
    while ((await machine.metrics()).milestones.init === undefined) await delay(5);
    await delay(50);
    await machine.snapshot(path, { stop: true });
    expect(savedCounter(path)).toBeGreaterThan(0);
    expect(savedCounter(path)).toBeLessThan(LENGTH);
    await using restored = await Machine.restore(path);
    await restored.resume();
    expect((await restored.wait()).code).toBe(4);
  });

  test('that reads and writes MMIO: a device with a state of its own sees each access once', async () => {
    const LENGTH = 0x1_0000;
    await using machine = await create(
      `
      mov esi, 0xd1000000
      mov edi, 0x200000
      mov ecx, ${LENGTH}
      rep movsb
      mov esi, 0x200000
      mov edi, 0xd1000000
      mov ecx, ${LENGTH}
      rep movsb
      mov esi, 0xd1000000
      mov eax, [rsi]
      add eax, 6
      out DEBUG_EXIT, al
      hlt`,
      { devices: [tape] },
    );
    const saved = async (from: Machine, what: string) => {
      const [message] = await once(from.device('tape'), 'message');
      expect(message).toBe(what);
      const path = fresh();
      await from.snapshot(path, { stop: true });
      expect(savedCounter(path)).toBeGreaterThan(0);
      expect(savedCounter(path)).toBeLessThan(LENGTH);
      return Machine.restore(path, { devices: [tape] });
    };
    const reading = saved(machine, 'read');
    await machine.start();
    await using second = await reading;
    const writing = saved(second, 'written');
    await second.resume();
    await using third = await writing;
    await third.resume();
    expect((await third.wait()).code).toBe(6);
  });
});

describeKvm('a device of the program', () => {
  test('goes on with its count and its ticks', async () => {
    const counter = { module: 'test/examples/counter/device.js', name: 'counter' };
    const path = fresh();
    await using machine = await create(
      `
      mov esi, 0xd1000000
      mov dword ptr [rsi], 1000
      mov dword ptr [rsi + 4], 1400
      mov dword ptr [rsi + 0xc], 5000
      mov al, 1
      out BOOT_TIMER, al
    again:
      mov eax, [rsi + 8]           # its alarm
      test eax, eax
      jz again
      mov eax, [rsi]
      sub eax, 1400
      add eax, 7
      out DEBUG_EXIT, al
      hlt`,
      { devices: [counter] },
    );
    await machine.start();
    while ((await machine.metrics()).milestones.init === undefined) await delay(5);
    await machine.snapshot(path, { stop: true });
    await using restored = await Machine.restore(path, { devices: [counter] });
    const alarm = once(restored.device('counter'), 'message');
    await restored.resume();
    expect(await alarm).toEqual([{ alarm: 1400 }]);
    expect((await restored.wait()).code).toBeGreaterThanOrEqual(7);
  });
});

describeKvm('a machine whose devices cannot be had again', () => {
  const halt = 'mov al, 1\n out BOOT_TIMER, al\n again: hlt\n jmp again';
  const image = (bytes: number) => {
    const path = fresh();
    writeFileSync(path, new Uint8Array(bytes));
    return path;
  };

  test('is not restored on a drive of another size', async () => {
    const path = fresh();
    await using machine = await create(halt, { drives: [{ file: image(64 * 1024) }] });
    await machine.snapshot(path);
    await expect(Machine.restore(path, { drives: [{ file: image(128 * 1024) }] })).rejects.toMatchObject({
      code: 'ERR_SNAPSHOT',
      message: expect.stringMatching(
        /^snapshot: blk0: .* has 131072 bytes, but the guest’s disk had 65536; give the file/,
      ),
    });
    await using restored = await Machine.restore(path);
    expect(restored.state).toBe('paused');
  });

  test('is not saved while a device of the program refuses; it and the device go on', async () => {
    const path = fresh();
    const moody = { module: 'test/support/devices/moody.js', name: 'moody' };
    await using machine = await create(halt, { devices: [moody] });
    await machine.start();
    const device = machine.device('moody');
    device.postMessage('throw');
    const message = expect.stringMatching(/^device 'moody': its save\(\) threw Error: not now \(at /);
    await expect(machine.snapshot(path)).rejects.toMatchObject({ code: 'ERR_DEVICE', message });
    expect(existsSync(path)).toBe(false);
    device.postMessage('ask');
    expect(await once(device, 'message')).toEqual([2]);
    expect((await machine.metrics()).state).toBe('running');
    await machine.snapshot(path);
    await using restored = await Machine.restore(path, { devices: [moody] });
    restored.device('moody').postMessage('ask');
    expect(await once(restored.device('moody'), 'message')).toEqual([3]);
    await expect(Machine.restore(path, { devices: [{ ...moody, name: 'other' }] })).rejects.toMatchObject({
      code: 'ERR_USAGE',
      message: "devices[0].name: the machine had 'moody' there",
    });
    await expect(Machine.restore(path, { devices: [{ ...moody, export: 'Sulky' }] })).rejects.toMatchObject({
      code: 'ERR_DEVICE',
      message: expect.stringMatching(/^device 'moody': its restore\(\) threw Error: never again/),
    });
  });

  test('may be closed while it is saved', async () => {
    const path = fresh();
    await using machine = await create(halt, { drives: [{ file: image(1 << 20), overlay: fresh() }] });
    await machine.start();
    const [saved] = await Promise.allSettled([machine.snapshot(path), machine.close()]);
    expect(existsSync(path)).toBe(saved.status === 'fulfilled');
    expect(readdirSync(folder).filter((name) => name.endsWith('.tmp'))).toEqual([]);
  });
});
