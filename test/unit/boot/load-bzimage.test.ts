import { afterAll, describe, expect, test } from 'vitest';
import { type BootSource, loadKernel } from '#dist/boot/load.js';
import { ImageError, MemoryError, UsageError } from '#dist/errors.js';
import { boot_params, setup_header } from '#dist/kvm/generated/abi.js';
import { layout } from '#dist/machine/layout.js';
import {
  type BzImageOptions,
  buildBzImage,
  buildElf,
  ImageDirectory,
  linuxNote,
  MiB,
  PAYLOAD_OFFSET,
  pack,
  pattern,
  pvhNote,
  ram,
} from '../../support/boot-images.js';

const directory = new ImageDirectory();
afterAll(() => directory.dispose());

const header = layout.bootParams + boot_params.hdr;
const text = pattern(100_000);
const data = pattern(5000, 2);
const vmlinux = buildElf({
  entry: 16 * MiB + 0x40,
  segments: [
    { paddr: 16 * MiB, vaddr: 0xffffffff81000000n, data: text },
    { paddr: 17 * MiB, vaddr: 0xffffffff81100000n, data, memsz: 2 * MiB },
  ],
  notes: [pvhNote(16 * MiB + 0x80), linuxNote],
});
// As scripts/Makefile.vmlinux leaves it: relocations after the ELF.
const payload = Buffer.concat([vmlinux, pattern(999, 3)]);

async function boot(image: BzImageOptions | Uint8Array, options: Partial<BootSource> = {}, memory = ram(32 * MiB)) {
  const kernel = directory.file('bzImage', image instanceof Uint8Array ? image : buildBzImage(image));
  return { memory, entry: await loadKernel(memory, { kernel, commandLine: 'quiet', ...options }) };
}

async function failure(attempt: Promise<unknown>): Promise<Error> {
  const error = await attempt.then(
    () => expect.unreachable('it loaded'),
    (reason: Error) => reason,
  );
  expect(error.message).not.toContain('\n');
  return error;
}

async function refuses(image: BzImageOptions | Uint8Array, message: string, options: Partial<BootSource> = {}) {
  const error = await failure(boot(image, options));
  expect(error).toBeInstanceOf(ImageError);
  expect(error.message).toContain('bzImage');
  expect(error.message).toContain(message);
}

describe('unpacked by the host', () => {
  test.each(['gzip', 'lz4', 'zstd', 'xz'] as const)('%s', async (compression) => {
    const { memory, entry } = await boot({ payload: pack(compression, payload) });
    expect(entry).toMatchObject({
      protocol: 'linux64',
      rip: 16 * MiB + 0x40,
      paramsGpa: layout.bootParams,
      kernelFormat: 'bzImage',
      compression,
      unpackedBy: 'host',
      kernelEnd: 19 * MiB,
    });
    expect(Buffer.compare(memory.slice(16 * MiB, text.length), text)).toBe(0);
    expect(Buffer.compare(memory.slice(17 * MiB, data.length), data)).toBe(0);
  });

  test('a payload that is not packed', async () => {
    expect((await boot({ payload })).entry).toMatchObject({ compression: 'none', unpackedBy: 'host' });
  });

  test('by PVH, if asked', async () => {
    const { entry } = await boot({ payload: pack('lz4', payload) }, { protocol: 'pvh' });
    expect(entry).toMatchObject({ protocol: 'pvh', rip: 16 * MiB + 0x80, paramsGpa: layout.pvhStartInfo });
  });

  test('the setup header goes into boot_params, with what a boot loader fills in', async () => {
    const initrd = directory.file('initrd', pattern(5000));
    const image = buildBzImage({ payload: pack('gzip', payload) });
    const { memory } = await boot(image, { initrd });
    const filledIn = ['vid_mode', 'type_of_loader', 'code32_start', 'ramdisk_image', 'ramdisk_size', 'cmd_line_ptr'];
    const fields = Object.entries(setup_header).filter(([name]) => name !== 'sizeof');
    fields.forEach(([name, at], i) => {
      const end = fields[i + 1]?.[1] ?? setup_header.sizeof;
      const expected = image.subarray(0x1f1 + at, 0x1f1 + end);
      if (!filledIn.includes(name)) expect([name, ...memory.slice(header + at, end - at)]).toEqual([name, ...expected]);
    });
    expect(memory.readU16(header + setup_header.vid_mode)).toBe(0xffff);
    expect(memory.readU8(header + setup_header.type_of_loader)).toBe(0xff);
    expect(memory.readU32(header + setup_header.code32_start)).toBe(16 * MiB);
    expect(memory.readU32(header + setup_header.ramdisk_image)).toBe(32 * MiB - 8192);
    expect(memory.readU32(header + setup_header.ramdisk_size)).toBe(5000);
    expect(memory.readU32(header + setup_header.cmd_line_ptr)).toBe(layout.commandLine);
    expect(Buffer.from(memory.slice(layout.commandLine, 6)).toString()).toBe('quiet\0');
    expect(memory.readU8(layout.bootParams + boot_params.e820_entries)).toBe(3);
  });

  test('a setup header that says it is longer than the room for it overwrites nothing', async () => {
    const image = buildBzImage({ payload });
    image[0x201] = 0xff;
    image.fill(0xee, 0x26c, 0x301);
    const { memory } = await boot(image);
    expect(memory.readU8(layout.bootParams + 0x290)).toBe(0);
  });
});

describe('unpacked by the guest', () => {
  test('bzip2 and what is unknown: enters the protected-mode code at 0x200', async () => {
    for (const [compression, packed] of [
      ['bzip2', pack('bzip2', payload)],
      ['unknown', pattern(5000)],
    ] as const) {
      const image = buildBzImage({ payload: packed });
      const { memory, entry } = await boot(image);
      expect(entry).toMatchObject({
        protocol: 'linux64',
        rip: 16 * MiB + 0x200,
        compression,
        unpackedBy: 'guest',
        kernelEnd: 20 * MiB, // init_size is 4 MiB
      });
      expect(Buffer.compare(memory.slice(16 * MiB, image.length - 1024), image.subarray(1024))).toBe(0);
      expect(memory.readU32(header + setup_header.code32_start)).toBe(16 * MiB);
    }
  });

  test('a header that does not say where the payload is', async () => {
    const { entry } = await boot({ payload: pack('gzip', payload), payloadOffset: 0, payloadLength: 0 });
    expect(entry).toMatchObject({ compression: 'unknown', unpackedBy: 'guest' });
  });

  test('setup_sects 0 means 4', async () => {
    const image = buildBzImage({ payload: pattern(500), setupSects: 0 });
    const { memory } = await boot(image);
    expect(Buffer.compare(memory.slice(16 * MiB, image.length - 2560), image.subarray(2560))).toBe(0);
  });

  test('an initrd stays out of init_size, and memory must hold it', async () => {
    const initrd = directory.file('initrd', pattern(12 * MiB - 5));
    const { entry } = await boot({ payload: pattern(500) }, { initrd });
    expect(entry.initrd?.start).toBe(20 * MiB);
    const error = await failure(boot({ payload: pattern(500) }, {}, ram(20 * MiB - 4096)));
    expect(error).toBeInstanceOf(MemoryError);
    expect(error.message).toContain('at least 20 MiB');
  });

  test('not by PVH', async () => {
    await refuses({ payload: pattern(500) }, 'cannot be unpacked for PVH', { protocol: 'pvh' });
  });
});

describe('images that are refused', () => {
  test('old and 32-bit kernels', async () => {
    await refuses({ payload, version: 0x020b }, 'boot protocol 2.11; tsvisor needs 2.12');
    await refuses({ payload, version: 0x0200 }, 'boot protocol 2.00');
    await refuses({ payload, xloadflags: 0x7e }, 'is a 32-bit kernel');
    await refuses({ payload: pack('gzip', buildElf({ bits: 32 })) }, 'is a 32-bit ELF');
    await refuses({ payload: pack('gzip', buildElf({ machine: 183 })) }, 'is an AArch64 ELF');
  });

  test('truncated, at every length', async () => {
    const image = buildBzImage({ payload: pack('lz4', payload) });
    // Up to 15 bytes may be missing: syssize counts paragraphs.
    const code = 1024 + PAYLOAD_OFFSET + pack('lz4', payload).length;
    for (let length = 0x206 + 2; length < code; length += length < 0x280 ? 3 : 4999) {
      await refuses(image.subarray(0, length), 'is truncated');
    }
    await boot(image.subarray(0, code));
  });

  test('headers that contradict themselves', async () => {
    await refuses({ payload, syssize: 1 }, 'only 16 bytes of code');
    await refuses({ payload, syssize: 0xffff_ffff }, 'is truncated');
    await refuses({ payload, payloadLength: 0xffff_ffff }, 'is truncated');
    await refuses({ payload, payloadOffset: 0xffff_ffff, payloadLength: 0xffff_ffff }, 'is truncated');
    await refuses({ payload, prefAddress: 1n << 32n }, 'contradicts itself');
    await refuses({ payload, prefAddress: 0xffff_ffff_ffff_f000n }, 'contradicts itself');
    await refuses({ payload, prefAddress: 0x1000001n }, 'contradicts itself');
    await refuses({ payload, alignment: 0 }, 'contradicts itself');
    await refuses({ payload, initSize: 4096 }, 'contradicts itself');
    await refuses({ payload: pattern(500), prefAddress: 0n }, 'over the boot GDT');
  });

  test('payloads that are corrupt or no ELF', async () => {
    await refuses({ payload: pack('xz', pattern(5000)) }, 'its xz payload is no ELF');
    await refuses({ payload: pack('zstd', vmlinux).subarray(0, 500) }, 'its zstd payload');
    const damaged = Buffer.from(pack('gzip', vmlinux));
    damaged.fill(0, 2000, 2100);
    await refuses({ payload: damaged }, 'its gzip payload is corrupt');
    const huge = Buffer.from(pack('lz4', vmlinux));
    huge.writeUInt32LE(0xffff_ffff, huge.length - 4);
    await refuses({ payload: huge }, 'where the header allows 4 MiB');
  });

  test('too little memory names how much is needed', async () => {
    const error = await failure(boot({ payload: pack('gzip', payload) }, {}, ram(8 * MiB)));
    expect(error).toBeInstanceOf(MemoryError);
    expect(error.message).toContain('needs at least 19 MiB of memory, and the machine has 8 MiB');
    const large = { payload: pack('gzip', payload), initSize: 9 * MiB };
    expect((await failure(boot(large, {}, ram(8 * MiB)))).message).toContain('at least 25 MiB');
  });

  test("a command line longer than the header's cmdline_size", async () => {
    const image = { payload: pack('gzip', payload), cmdlineSize: 255 };
    await boot(image, { commandLine: 'x'.repeat(255) });
    const error = await failure(boot(image, { commandLine: 'x'.repeat(256) }));
    expect(error).toBeInstanceOf(UsageError);
    expect(error.message).toContain('has 256 bytes, and this kernel takes 255');
    const generous = { ...image, cmdlineSize: 0xffff_ffff };
    await boot(generous, { commandLine: 'x'.repeat(0xffff) });
    expect((await failure(boot(generous, { commandLine: 'x'.repeat(0x10000) }))).message).toContain('takes 65535');
  });

  test("an initrd is placed below the header's initrd_addr_max", async () => {
    const initrd = directory.file('initrd', pattern(4096));
    const { entry } = await boot({ payload: pack('gzip', payload), initrdAddrMax: 0x14f_ffff }, { initrd });
    expect(entry.initrd).toEqual({ start: 0x14f_f000, end: 0x150_0000 });
  });
});
