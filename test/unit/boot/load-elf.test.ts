import { execFileSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { type BootSource, loadKernel } from '#dist/boot/load.js';
import { ImageError, MemoryError, UsageError } from '#dist/errors.js';
import { boot_params, setup_header } from '#dist/kvm/generated/abi.js';
import { layout } from '#dist/machine/layout.js';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import {
  buildElf,
  type ElfOptions,
  GiB,
  ImageDirectory,
  linuxNote,
  MiB,
  pattern,
  pvhNote,
  ram,
} from '../../support/boot-images.js';

const directory = new ImageDirectory();
afterAll(() => directory.dispose());

const header = layout.bootParams + boot_params.hdr;

async function boot(image: ElfOptions | Uint8Array, options: Partial<BootSource> = {}, memory = ram(16 * MiB)) {
  const bytes = image instanceof Uint8Array ? image : buildElf(image);
  const kernel = directory.file('kernel', bytes);
  return { memory, entry: await loadKernel(memory, { kernel, commandLine: '', ...options }) };
}

/** The error a source gives. Every one is a single line that names the file. */
async function failure(attempt: Promise<unknown>): Promise<Error> {
  const error = await attempt.then(
    () => expect.unreachable('it loaded'),
    (reason: Error) => reason,
  );
  expect(error.message).not.toContain('\n');
  return error;
}

async function refuses(image: ElfOptions | Uint8Array, text: string, options: Partial<BootSource> = {}) {
  const error = await failure(boot(image, options));
  expect(error).toBeInstanceOf(ImageError);
  expect(error.message).toContain(join(directory.path, 'kernel'));
  expect(error.message).toContain(text);
}

const linux: ElfOptions = {
  entry: 2 * MiB + 0x40,
  segments: [
    { paddr: 2 * MiB, vaddr: 0xffffffff81000000n, data: pattern(5000) },
    { paddr: 3 * MiB, vaddr: 0xffffffff82000000n, data: pattern(300, 2), memsz: 70_000 },
  ],
  notes: [pvhNote(2 * MiB + 0x80), linuxNote],
};

describe('which protocol', () => {
  test('a Linux vmlinux enters at its physical 64-bit entry, though it has a PVH note', async () => {
    const { entry } = await boot(linux);
    expect(entry).toEqual({
      protocol: 'linux64',
      rip: 2 * MiB + 0x40,
      paramsGpa: layout.bootParams,
      kernelFormat: 'vmlinux',
      compression: undefined,
      unpackedBy: undefined,
      kernelEnd: 3 * MiB + 70_000,
      initrd: undefined,
    });
  });

  test('XEN_ELFNOTE_GUEST_OS "linux" is Linux too', async () => {
    const guestOs = { name: 'Xen', type: 6, description: Buffer.from('linux\0') };
    expect((await boot({ notes: [guestOs, pvhNote(MiB)] })).entry.protocol).toBe('linux64');
    const other = { name: 'Xen', type: 6, description: Buffer.from('FreeBSD\0') };
    expect((await boot({ notes: [other, pvhNote(MiB)] })).entry.protocol).toBe('pvh');
  });

  test.each([4, 8] as const)('another ELF with a PVH note of %i bytes enters there', async (size) => {
    const { entry } = await boot({
      notes: [{ name: 'GNU', type: 3, description: pattern(20) }, pvhNote(MiB + 4, size)],
    });
    expect(entry).toMatchObject({ protocol: 'pvh', rip: MiB + 4, paramsGpa: layout.pvhStartInfo, kernelFormat: 'elf' });
  });

  test('a 32-bit ELF with a PVH note', async () => {
    const { memory, entry } = await boot({ bits: 32, notes: [pvhNote(MiB + 8, 4)] });
    expect(entry).toMatchObject({ protocol: 'pvh', rip: MiB + 8 });
    expect(memory.slice(MiB, 16)).toEqual(pattern(16));
  });

  test('an ELF with neither enters in 64-bit mode', async () => {
    const { entry } = await boot({ entry: MiB + 3 });
    expect(entry).toMatchObject({ protocol: 'linux64', rip: MiB + 3, kernelFormat: 'elf' });
  });

  test('a virtual entry point is translated to a physical one', async () => {
    const segments = [{ paddr: 2 * MiB, vaddr: 0xffff800000000000n, data: pattern(64) }];
    expect((await boot({ segments, entry: 0xffff800000000010n })).entry.rip).toBe(2 * MiB + 0x10);
  });

  test('can be chosen', async () => {
    expect((await boot(linux, { protocol: 'pvh' })).entry).toMatchObject({ protocol: 'pvh', rip: 2 * MiB + 0x80 });
    expect((await boot({ notes: [pvhNote(MiB)] }, { protocol: 'linux64' })).entry.protocol).toBe('linux64');
    await refuses({}, 'has no PVH note', { protocol: 'pvh' });
    await refuses({ bits: 32, notes: [pvhNote(MiB)] }, 'is a 32-bit ELF', { protocol: 'linux64' });
  });
});

describe('what is in memory', () => {
  test('segments are where they belong, and the rest of each is zero', async () => {
    const memory = ram(16 * MiB);
    memory.slice(2 * MiB, 2 * MiB).fill(0xee);
    await boot(linux, {}, memory);
    expect(memory.slice(2 * MiB, 5000)).toEqual(pattern(5000));
    expect(memory.readU8(2 * MiB + 5000)).toBe(0xee);
    expect(memory.slice(3 * MiB, 300)).toEqual(pattern(300, 2));
    expect(memory.slice(3 * MiB + 300, 70_000 - 300).every((byte) => byte === 0)).toBe(true);
    expect(memory.readU8(3 * MiB + 70_000)).toBe(0xee);
  });

  test('a segment and an initrd may lie across regions', async () => {
    const sizes = [2 * MiB, MiB, MiB];
    let gpa = 0;
    const regions = sizes.map((size) => {
      gpa += size;
      return { gpa: gpa - size, buffer: new ArrayBuffer(size) };
    });
    const data = pattern(MiB);
    const initrd = directory.file('initrd', pattern(MiB + 77, 3));
    const { memory, entry } = await boot(
      { segments: [{ paddr: 1.5 * MiB, data, memsz: MiB + 16 }] },
      { initrd },
      new GuestMemory(regions),
    );
    const loaded = new Uint8Array(MiB + 16);
    memory.read(1.5 * MiB, loaded);
    expect(Buffer.compare(loaded, Buffer.concat([data, new Uint8Array(16)]))).toBe(0);
    expect(entry.initrd).toEqual({ start: 3 * MiB - 4096, end: 4 * MiB - 4096 + 77 });
    const ramdisk = new Uint8Array(MiB + 77);
    memory.read(3 * MiB - 4096, ramdisk);
    expect(Buffer.compare(ramdisk, pattern(MiB + 77, 3))).toBe(0);
  });

  test('boot_params of a bare vmlinux', async () => {
    const initrd = directory.file('initrd', pattern(5000, 3));
    const { memory, entry } = await boot(linux, { initrd, commandLine: 'console=ttyS0 ü' });
    expect(entry.initrd).toEqual({ start: 16 * MiB - 8192, end: 16 * MiB - 8192 + 5000 });
    expect(memory.slice(16 * MiB - 8192, 5000)).toEqual(pattern(5000, 3));
    expect(memory.readU16(header + setup_header.boot_flag)).toBe(0xaa55);
    expect(memory.readU32(header + setup_header.header)).toBe(0x53726448);
    expect(memory.readU16(header + setup_header.version)).toBe(0x020f);
    expect(memory.readU8(header + setup_header.type_of_loader)).toBe(0xff);
    expect(memory.readU8(header + setup_header.loadflags)).toBe(1);
    expect(memory.readU32(header + setup_header.ramdisk_image)).toBe(16 * MiB - 8192);
    expect(memory.readU32(header + setup_header.ramdisk_size)).toBe(5000);
    expect(memory.readU32(header + setup_header.cmd_line_ptr)).toBe(layout.commandLine);
    const text = Buffer.from('console=ttyS0 ü\0');
    expect(Buffer.from(memory.slice(layout.commandLine, text.length))).toEqual(text);
    const zero = ['ext_ramdisk_image', 'ext_ramdisk_size', 'ext_cmd_line_ptr', 'acpi_rsdp_addr'] as const;
    for (const field of zero) expect(memory.readU32(layout.bootParams + boot_params[field])).toBe(0);
    expect(memory.readU8(layout.bootParams + boot_params.sentinel)).toBe(0);
    expect(memory.slice(layout.bootParams, 0x40).every((byte) => byte === 0)).toBe(true);

    expect(memory.readU8(layout.bootParams + boot_params.e820_entries)).toBe(3);
    const e820 = layout.bootParams + boot_params.e820_table;
    const entries = [0, 1, 2].map((i) => [
      memory.readU64(e820 + 20 * i),
      memory.readU64(e820 + 20 * i + 8),
      memory.readU32(e820 + 20 * i + 16),
    ]);
    expect(entries).toEqual([
      [0n, 0x9e000n, 1],
      [0x9e000n, 0x2000n, 2],
      [0x100000n, 0xf00000n, 1],
    ]);
  });

  test('hvm_start_info', async () => {
    const initrd = directory.file('initrd', pattern(5000, 3));
    const { memory } = await boot({ notes: [pvhNote(MiB)] }, { initrd, commandLine: 'hello' });
    const info = layout.pvhStartInfo;
    expect([0, 4, 8, 12].map((at) => memory.readU32(info + at))).toEqual([0x336ec578, 1, 0, 1]);
    const module = Number(memory.readU64(info + 16));
    expect([0, 8, 16, 24].map((at) => memory.readU64(module + at))).toEqual([0xffe000n, 5000n, 0n, 0n]);
    expect(memory.slice(0xffe000, 5000)).toEqual(pattern(5000, 3));
    const commandLine = Number(memory.readU64(info + 24));
    expect(Buffer.from(memory.slice(commandLine, 6)).toString()).toBe('hello\0');
    expect(memory.readU64(info + 32)).toBe(0n);
    const map = Number(memory.readU64(info + 40));
    expect([memory.readU32(info + 48), memory.readU32(info + 52)]).toEqual([3, 0]);
    const entries = [0, 24, 48].map((at) => [
      memory.readU64(map + at),
      memory.readU64(map + at + 8),
      memory.readU64(map + at + 16),
    ]);
    expect(entries).toEqual([
      [0n, 0x9e000n, 1n],
      [0x9e000n, 0x2000n, 2n],
      [0x100000n, 0xf00000n, 1n],
    ]);
    const { memory: without } = await boot({ notes: [pvhNote(MiB)] });
    expect([without.readU32(info + 12), without.readU64(info + 16)]).toEqual([0, 0n]);
  });

  test('ACPI tables: both protocols name the RSDP and reserve the place', async () => {
    const rsdp = 0xe1230;
    const { memory } = await boot(linux, { rsdp });
    expect(memory.readU64(layout.bootParams + boot_params.acpi_rsdp_addr)).toBe(BigInt(rsdp));
    expect(memory.readU8(layout.bootParams + boot_params.e820_entries)).toBe(4);
    const e820 = layout.bootParams + boot_params.e820_table + 2 * 20;
    expect([0, 8].map((at) => memory.readU64(e820 + at))).toEqual([0xe0000n, 0x20000n]);
    expect(memory.readU32(e820 + 16)).toBe(2);

    const { memory: pvh } = await boot({ notes: [pvhNote(MiB)] }, { rsdp });
    const info = layout.pvhStartInfo;
    expect(pvh.readU64(info + 32)).toBe(BigInt(rsdp));
    expect(pvh.readU32(info + 48)).toBe(4);
    const map = Number(pvh.readU64(info + 40)) + 2 * 24;
    expect([0, 8, 16].map((at) => pvh.readU64(map + at))).toEqual([0xe0000n, 0x20000n, 2n]);
  });

  test('no kernel is loaded over ACPI tables', async () => {
    const elf = { segments: [{ paddr: 0xe0000, data: pattern(16) }] };
    expect(await failure(boot(elf, { rsdp: 0xe0000 }))).toBeInstanceOf(ImageError);
  });
});

describe('files that are no kernel', () => {
  const source = (kernel: string, initrd?: string) => loadKernel(ram(16 * MiB), { kernel, initrd, commandLine: '' });

  test('missing, a directory, empty, a FIFO, a device, a bad path: as kernel and as initrd', async () => {
    const good = directory.file('good', buildElf());
    const path = (name: string) => join(directory.path, name);
    mkdirSync(path('directory'));
    execFileSync('mkfifo', [path('fifo')]);
    directory.file('empty', new Uint8Array());
    const cases: [string, string][] = [
      [path('missing'), 'no such file'],
      [join(good, 'below'), 'not a directory'],
      [path('directory'), 'is a directory'],
      [path('empty'), 'is empty'],
      [path('fifo'), 'is a FIFO'],
      ['/dev/null', 'is a device'],
      [`${good}\0x`, 'NUL byte'],
      [path('x'.repeat(300)), 'too long'],
    ];
    for (const [name, text] of cases) {
      for (const attempt of [source(name), source(good, name)]) {
        const error = await failure(attempt);
        expect(error).toBeInstanceOf(ImageError);
        expect(error.message).toContain(name);
        expect(error.message).toContain(text);
      }
    }
  });

  test('random bytes, one byte, a boot sector, a packed kernel, an arm64 Image', async () => {
    await refuses(pattern(5000), 'neither an ELF nor a bzImage');
    await refuses(Uint8Array.of(0x7f), 'neither an ELF nor a bzImage');
    const sector = new Uint8Array(512);
    sector.set([0x55, 0xaa], 510);
    await refuses(sector, 'neither an ELF nor a bzImage');
    await refuses(Buffer.from('1f8b0800000000000203', 'hex'), 'is gzip data by itself');
    const arm = new Uint8Array(64);
    arm.set(Buffer.from('ARMd'), 56);
    await refuses(arm, 'is an arm64 Image');
  });

  test('ELFs for something else', async () => {
    await refuses({ machine: 183 }, 'is an AArch64 ELF');
    await refuses({ machine: 243 }, 'is a RISC-V ELF');
    await refuses({ machine: 999 }, 'machine 999');
    await refuses({ machine: 3 }, 'machine 3');
    await refuses({ bits: 32 }, 'is a 32-bit ELF without a PVH note');
    await refuses({ type: 1 }, 'is an object file');
    await refuses({ type: 4 }, 'is a core dump');
    await refuses({ segments: [{ type: 3, data: Buffer.from('/lib64/ld.so\0') }] }, 'is a program, not a kernel');
    const bigEndian = buildElf();
    bigEndian[5] = 2;
    await refuses(bigEndian, 'is a big-endian ELF');
    const noClass = buildElf();
    noClass[4] = 7;
    await refuses(noClass, 'unknown class 7');
  });

  test('truncated ELFs, at every length', async () => {
    const whole = buildElf(linux);
    for (let length = 4; length < whole.length; length += length < 300 ? 1 : 397) {
      await refuses(whole.subarray(0, length), 'is truncated');
    }
  });

  test('headers that make no sense', async () => {
    await refuses({ segments: [] }, 'has no program headers');
    await refuses({ segments: [{ paddr: MiB }] }, 'has no PT_LOAD segment');
    await refuses({ phnum: 0xffff }, '65535 program headers');
    await refuses({ phentsize: 32 }, 'program headers of 32 bytes');
    await refuses({ phoff: 1n << 40n }, 'is truncated');
    await refuses({ phoff: (1n << 64n) - 1n }, 'out of range');
    const data = pattern(16);
    const segment = (changes: object) => ({ segments: [{ paddr: MiB, data, ...changes }], entry: MiB });
    await refuses(segment({ offset: 1n << 63n }), 'out of range');
    await refuses(segment({ filesz: 1n << 60n }), 'out of range');
    await refuses(segment({ filesz: 1 << 30 }), 'is truncated');
    await refuses(segment({ memsz: 15 }), 'more bytes in the file than in memory');
    await refuses(segment({ memsz: (1n << 64n) - 1n }), 'out of range');
    await refuses(segment({ paddr: 2n ** 53n }), 'out of range');
    await refuses(segment({ paddr: 2n ** 53n - 17n, memsz: 32 }), 'beyond 2^53');
    await refuses(segment({ paddr: 0xffffffff81000000n }), 'out of range');
    await refuses({ entry: 0 }, 'entry point 0x0 is in no segment');
    await refuses({ entry: MiB + 16 }, 'is in no segment');
    await refuses({ notes: [pvhNote(0x5000)] }, 'PVH entry 0x5000 is in no segment');
    const two = (second: number) => [
      { paddr: MiB, data },
      { paddr: second, data },
    ];
    await refuses({ segments: two(MiB + 15) }, 'two segments');
    await boot({ segments: two(MiB + 16) });
  });

  test('damaged notes are no notes', async () => {
    const note = buildElf({ notes: [pvhNote(MiB)] });
    const at = note.lastIndexOf('Xen') - 12;
    note.writeUInt32LE(0xffff_ffff, at + 4);
    expect((await boot(note)).entry.protocol).toBe('linux64');
    note.writeUInt32LE(2, at + 4); // a description that is too short
    expect((await boot(note)).entry.protocol).toBe('linux64');
  });
});

describe('where a kernel may go', () => {
  const at = (paddr: number, memsz = 16) => ({ segments: [{ paddr, data: pattern(16), memsz }] });

  test('not over the boot structures', async () => {
    await refuses(at(layout.bootGdt), 'the boot GDT');
    await refuses(at(layout.pvhStartInfo), 'the PVH start info');
    await refuses(at(layout.bootParams + 4095), 'the boot parameters');
    await refuses(at(layout.bootPageTables + 5 * 4096), 'the boot page tables');
    await refuses(at(0x10000, 0x10001), 'the command line');
    await boot(at(0x10000, 0x10000));
    await boot(at(0x30000));
  });

  test('only in RAM', async () => {
    await refuses(at(0x9fbff), 'no RAM');
    await refuses(at(0xf0000), 'no RAM');
    await refuses(at(MiB - 1), 'no RAM');
    await refuses(at(0xd000_0000), 'no RAM');
    await refuses(
      {
        segments: [
          { paddr: MiB, data: pattern(16) },
          { paddr: 2 ** 33, memsz: 16 },
        ],
      },
      'no RAM',
    );
    await boot(at(16 * MiB - 16));
  });

  test('above 4 GiB, but not the entry point: page tables end there', async () => {
    const high = 5 * GiB;
    const memory = () =>
      new GuestMemory([
        { gpa: 0, buffer: new ArrayBuffer(2 * MiB) },
        { gpa: high, buffer: new ArrayBuffer(MiB) },
      ]);
    const segments = [
      { paddr: MiB, data: pattern(16) },
      { paddr: high, data: pattern(32) },
    ];
    const loaded = await boot({ segments }, {}, memory());
    expect(loaded.memory.slice(high, 32)).toEqual(pattern(32));
    const error = await failure(boot({ segments, entry: high }, {}, memory()));
    expect(error.message).toContain('entry point is at 0x140000000');
  });

  test('more than there is: the memory it needs is named', async () => {
    const error = await failure(boot(at(16 * MiB, 3.5 * MiB), {}, ram(8 * MiB)));
    expect(error).toBeInstanceOf(MemoryError);
    expect(error.message).toContain('needs at least 20 MiB of memory, and the machine has 8 MiB');
    await boot(at(16 * MiB, 3.5 * MiB), {}, ram(20 * MiB));
    expect(await failure(boot({}, {}, ram(64 * 1024)))).toBeInstanceOf(MemoryError);
  });

  test('nothing is written for one that is refused', async () => {
    const memory = ram(4 * MiB);
    const segments = [
      { paddr: MiB, data: pattern(16) },
      { paddr: 5 * MiB, data: pattern(16) },
    ];
    await failure(boot({ segments }, {}, memory));
    expect(memory.slice(0, 4 * MiB).every((byte) => byte === 0)).toBe(true);
  });
});

describe('command line', () => {
  test('2047 bytes, counted in UTF-8', async () => {
    const { memory } = await boot({}, { commandLine: 'x'.repeat(2047) });
    expect(memory.readU8(layout.commandLine + 2046)).toBe(0x78);
    expect(memory.readU8(layout.commandLine + 2047)).toBe(0);
    for (const [commandLine, size] of [
      ['x'.repeat(2048), 2048],
      ['ü'.repeat(1024), 2048],
    ] as const) {
      const error = await failure(boot({}, { commandLine }));
      expect(error).toBeInstanceOf(UsageError);
      expect(error.message).toContain(`has ${size} bytes`);
      expect(error.message).toContain('takes 2047');
    }
  });

  test('no NUL', async () => {
    const error = await failure(boot({}, { commandLine: 'a\0b' }));
    expect(error).toBeInstanceOf(UsageError);
    expect(error.message).toContain('NUL');
  });
});
