import { readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Machine, type MachineConfig } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';
import { BlkRig, openDrive } from '../support/virtio/blk-rig.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const MiB = 2 ** 20;
const folder = temporaryFolder();
let count = 0;

function image(contents: (bytes: Uint8Array) => void = () => {}): string {
  const path = join(folder, `${count++}.img`);
  const bytes = new Uint8Array(64 * 1024);
  contents(bytes);
  writeFileSync(path, bytes);
  return path;
}

/**
 * A guest's driver for the first virtio device, a queue of 8: `request` does type eax at sector ebx with the 512 bytes at
 * DATA and returns its status in al; `send` only starts it. Interrupts are off: the used index is polled.
 */
const DRIVER = `
.set REGISTERS, 0xd0000000
.set RING, 0x300000            # descriptors; available ring at +0x100; used ring at +0x200
.set HEADER, 0x301000
.set DATA, 0x302000
.set STATUS, 0x303000
.macro reg offset, value
  mov dword ptr [rbp + \\offset], \\value
.endm
  mov esp, 0x2ff000
  mov ebp, REGISTERS
  reg 0x70, 0
  reg 0x70, 3
  reg 0x24, 1
  reg 0x20, 1                  # VERSION_1
  reg 0x24, 0
  reg 0x20, 0x200              # FLUSH
  reg 0x70, 11
  reg 0x30, 0
  reg 0x38, 8
  reg 0x80, RING
  reg 0x90, RING + 0x100
  reg 0xa0, RING + 0x200
  reg 0x44, 1
  reg 0x70, 15
  jmp main

descriptor:                    # edi: at, esi: address, ecx: length, edx: flags and next
  mov dword ptr [rdi], esi
  mov dword ptr [rdi + 8], ecx
  mov dword ptr [rdi + 12], edx
  ret

send:
  mov dword ptr [HEADER], eax
  mov dword ptr [HEADER + 8], ebx
  mov byte ptr [STATUS], 0xff
  mov edi, RING
  mov esi, HEADER
  mov ecx, 16
  mov edx, 0x10001
  call descriptor
  mov edi, RING + 16
  mov esi, DATA
  mov ecx, 512
  mov edx, 0x20001
  cmp eax, 0
  jne readable
  or edx, 2                    # a read: the device writes
readable:
  call descriptor
  mov edi, RING + 32
  mov esi, STATUS
  mov ecx, 1
  mov edx, 2
  call descriptor
  inc word ptr [RING + 0x102]
  reg 0x50, 0
  ret

request:
  call send
wait:
  movzx ecx, word ptr [RING + 0x102]
  cmp cx, word ptr [RING + 0x202]
  jne wait
  mov al, byte ptr [STATUS]
  ret

main:
`;

const POWER_OFF = `
  mov dx, SLEEP_CONTROL
  mov al, 0x34
  out dx, al`;

async function runWithMetrics(assembly: string, config: Partial<MachineConfig>) {
  const kernel = guestProgram(DRIVER + assembly);
  await using machine = await Machine.create({ kernel, memory: 4 * MiB, serial: false, ...config });
  await machine.start();
  return { end: await machine.wait(), metrics: await machine.metrics() };
}

async function run(assembly: string, config: Partial<MachineConfig>) {
  return (await runWithMetrics(assembly, config)).end;
}

describeKvm('a guest with a drive', () => {
  test('reads, writes and flushes it; the image is complete when the machine has ended', async () => {
    const file = image((bytes) => bytes.fill(41, 512, 1024));
    const { end, metrics } = await runWithMetrics(
      `
      mov eax, 0
      mov ebx, 1
      call request
      inc byte ptr [DATA]
      mov eax, 1
      mov ebx, 3
      call request
      mov ah, al
      mov eax, 4
      mov ebx, 0
      call request
      add al, byte ptr [DATA]
      out DEBUG_EXIT, al`,
      { drives: [{ file }] },
    );
    expect(end).toMatchObject({ reason: 'guest-exit', code: 42 });
    expect(metrics.devices.blk0).toMatchObject({ notifications: 3, interrupts: 1, errors: 0 });
    expect(metrics.devices.blk0).toMatchObject({ reads: 1, readBytes: 512, writes: 1, writtenBytes: 512, flushes: 1 });
    const bytes = readFileSync(file);
    expect([...bytes.subarray(3 * 512 - 1, 3 * 512 + 2), bytes[4 * 512 - 1], bytes[4 * 512]]).toEqual([
      0, 42, 41, 41, 0,
    ]);
  });

  test('that resets itself in the middle of a write finds what it was told is written', async () => {
    const file = image();
    const overlay = `${file}.overlay`;
    for (const drive of [{ file, overlay }, { file }]) {
      const end = await run(
        `
        mov eax, 0
        mov ebx, 0
        call request
        cmp byte ptr [DATA], 0
        jne second
        mov byte ptr [DATA], 9
        mov eax, 1
        call request
        mov eax, 1
        mov ebx, 2
        call send
        mov al, 0xfe
        out I8042, al
      second:
        mov al, byte ptr [DATA]
        out DEBUG_EXIT, al`,
        { drives: [drive] },
      );
      expect(end).toMatchObject({ reason: 'guest-exit', code: 9 });
    }
  });

  test('keeps its writes in the overlay, flushed or not, and the base as it was', async () => {
    const file = image((bytes) => bytes.fill(5));
    const overlay = `${file}.overlay`;
    const before = readFileSync(file);
    const write = `
      mov byte ptr [DATA], 77
      mov eax, 1
      mov ebx, 8
      call request
      ${POWER_OFF}`;
    expect(await run(write, { drives: [{ file, overlay }] })).toMatchObject({ reason: 'guest-shutdown' });
    expect(readFileSync(file).equals(before)).toBe(true);
    const rig = new BlkRig(openDrive(file, { overlay }));
    const { data } = rig.read(0, 16 * 512);
    expect([data[8 * 512 - 1], data[8 * 512], data[8 * 512 + 1], data[9 * 512]]).toEqual([5, 77, 0, 5]);
    rig.close();
  });

  test('whose image becomes shorter sees I/O errors, or the machine ends', async () => {
    // Reads its last sector until that fails; the status is the exit code.
    const kernel = guestProgram(`${DRIVER}
    again:
      mov eax, 0
      mov ebx, 127
      call request
      cmp al, 0
      je again
      out DEBUG_EXIT, al`);
    const ends = [];
    for (const onError of ['report', 'end'] as const) {
      const file = image();
      await using machine = await Machine.create({ kernel, memory: 4 * MiB, drives: [{ file, onError }] });
      const errors: unknown[] = [];
      machine.on('driveError', (error) => errors.push(error));
      await machine.start();
      truncateSync(file, 512);
      ends.push(await machine.wait());
      expect(errors).toEqual([{ drive: 0, message: `blk0 (${file}): reading 512 bytes at 65024 failed with EIO` }]);
    }
    expect(ends[0]).toMatchObject({ reason: 'guest-exit', code: 1 });
    expect(ends[1]).toMatchObject({ reason: 'drive-failure', message: expect.stringContaining('EIO') });
  });

  test('that is stopped in the middle of everything leaves no descriptor, lock or thread', async () => {
    const file = image();
    const forever = `
    again:
      mov eax, 1
      mov ebx, 3
      call request
      jmp again`;
    const kernel = guestProgram(DRIVER + forever);
    const cycle = async () => {
      await using machine = await Machine.create({ kernel, memory: 4 * MiB, serial: false, drives: [{ file }] });
      await machine.start();
      await machine.pause();
      await machine.resume();
      expect(await machine.stop()).toMatchObject({ reason: 'stopped' });
      openDrive(file).close(); // the machine has ended: the image is free
    };
    await cycle();
    const before = resources();
    for (let i = 0; i < 3; i++) await cycle();
    await expectNoMoreThan(before);
  });
});

describeKvm('a machine', () => {
  test('is not made with a drive that cannot be had', async () => {
    const kernel = guestProgram(DRIVER);
    const create = (file: string) => Machine.create({ kernel, memory: 4 * MiB, drives: [{ file }] });
    await expect(create(join(folder, 'none.img'))).rejects.toMatchObject({ code: 'ERR_DRIVE' });
    const file = image();
    await using first = await create(file);
    await expect(create(file)).rejects.toThrow(/in use by another machine/);
    await first.stop();
  });
});
