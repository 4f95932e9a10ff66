import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { undoX86Filter } from '#dist/boot/decompress/bcj-x86.js';
import { crc32 } from '#dist/boot/decompress/crc32.js';
import { decodeLz4Legacy } from '#dist/boot/decompress/lz4.js';
import { xxh64 } from '#dist/boot/decompress/xxh64.js';
import { decodeXz } from '#dist/boot/decompress/xz.js';
import { decodeZstd } from '#dist/boot/decompress/zstd.js';
import { type Compression, canUnpack, compressionOf, unpack } from '#dist/boot/decompress.js';
import { ImageError } from '#dist/errors.js';
import { MiB, pack, pattern, randomIntegers } from '../../support/boot-images.js';

const formats = ['gzip', 'lz4', 'zstd', 'xz'] as const;

function expectSame(actual: Uint8Array, expected: Uint8Array): void {
  expect(actual.length).toBe(expected.length);
  expect(Buffer.compare(actual, expected)).toBe(0);
}

/** Machine code: what the x86 filter is for. */
const code = readFileSync(process.execPath).subarray(16 * MiB, 18 * MiB + 3);
const noise = Uint8Array.from({ length: 300_001 }, (_, i) => (Math.imul(i + 1, 0x9e3779b1) ^ (i << 7)) >>> 13);

const samples: [string, Uint8Array][] = [
  ['one byte', Uint8Array.of(7)],
  ['a few bytes', Buffer.from('hello, hello, hello, hello')],
  ['zeros, in more than one lz4 block', new Uint8Array(17 * MiB + 1)],
  ['a pattern', pattern(200_000)],
  ['noise', noise],
  ['machine code', code],
];

describe.each(formats)('%s', (format) => {
  test.each(samples)('round trip of %s', async (_, bytes) => {
    const packed = pack(format, bytes);
    expect(compressionOf(packed)).toBe(format);
    expectSame(await unpack('kernel x', format, packed, bytes.length), bytes);
  });

  test('cut off at any point, or with another size, is an ImageError', async () => {
    const bytes = pattern(5000);
    const packed = pack(format, bytes);
    for (let length = 0; length < packed.length; length += 41) {
      const cut = Buffer.concat([packed.subarray(0, length), packed.subarray(-4)]);
      await expect(unpack('kernel x', format, cut, MiB)).rejects.toBeInstanceOf(ImageError);
    }
    for (const change of [-1, 1, 70_000]) {
      const wrong = Buffer.from(packed);
      wrong.writeUInt32LE(bytes.length + change, packed.length - 4);
      await expect(unpack('kernel x', format, wrong, MiB)).rejects.toBeInstanceOf(ImageError);
    }
    for (const bytes of [new Uint8Array(), packed.subarray(0, 7)]) {
      await expect(unpack('kernel x', format, bytes, MiB)).rejects.toBeInstanceOf(ImageError);
    }
  });

  test('a size beyond the limit is refused before anything is allocated', async () => {
    const packed = Buffer.from(pack(format, pattern(5000)));
    await expect(unpack('kernel x', format, packed, 4999)).rejects.toThrow('unpacks to 4.9 KiB');
    packed.writeUInt32LE(0xffff_ffff, packed.length - 4);
    await expect(unpack('kernel x', format, packed, 2 ** 31)).rejects.toThrow('unpacks to 4096 MiB');
  });
});

test('damage to gzip, zstd and xz is always found, wherever it is', async () => {
  const bytes = pattern(20_000);
  const random = randomIntegers(1);
  for (const format of ['gzip', 'zstd', 'xz'] as const) {
    const packed = pack(format, bytes);
    for (let i = 0; i < 150; i++) {
      const damaged = Buffer.from(packed);
      const at = random(packed.length);
      damaged[at] = (damaged[at] as number) ^ (1 << random(8));
      const result = await unpack('kernel x', format, damaged, MiB).catch((error: Error) => error);
      // Fields without meaning for the data, such as gzip's time or the .xz index, may change.
      if (result instanceof Error) expect(result).toBeInstanceOf(ImageError);
      else expectSame(result, bytes);
    }
  }
});

test('the formats that the guest has to unpack are told apart', () => {
  const magics: [Compression, number[]][] = [
    ['bzip2', [0x42, 0x5a, 0x68, 0x39]],
    ['lzma', [0x5d, 0, 0, 0, 4]],
    ['lzo', [0x89, 0x4c, 0x5a, 0x4f, 0]],
    ['unknown', [1, 2, 3, 4]],
    ['unknown', []],
  ];
  for (const [format, magic] of magics) {
    expect(compressionOf(Uint8Array.from(magic))).toBe(format);
    expect(canUnpack(format)).toBe(false);
  }
  for (const format of [...formats, 'none'] as const) expect(canUnpack(format)).toBe(true);
});

describe('lz4', () => {
  const decode = (hex: string, size = 100) => {
    const out = new Uint8Array(size);
    return out.subarray(0, decodeLz4Legacy(Buffer.from(hex, 'hex'), out));
  };

  const block = (hex: string) => {
    const size = Buffer.alloc(4);
    size.writeUInt32LE(hex.length / 2);
    return size.toString('hex') + hex;
  };
  const magic = '02214c18';

  test('by hand: literals, a match that overlaps itself, literals; blocks and frames one after the other', () => {
    // Token 32: 3 literals and a match of 4 + 2, at offset 2. Token 10: 1 literal.
    const one = block('32616263' + '0200' + '1078');
    const text = 'abcbcbcbcx';
    const decoded = (hex: string) => Buffer.from(decode(hex)).toString('latin1');
    expect(decoded(magic + one)).toBe(text);
    expect(decoded(magic + one + one)).toBe(text + text);
    expect(decoded(magic + one + magic + one)).toBe(text + text);
  });

  test.each([
    ['offset 0', block('1061' + '0000' + '1078'), 'before the block'],
    ['a match before the block', block('1061' + '0200' + '1078'), 'before the block'],
    ['a match into the block before', block('1061') + block('10610200' + '1078'), 'before the block'],
    ['literals past the block', block('f0ff'), 'a length is cut off'],
    ['literals past the end', block('3061'), 'run past'],
    ['half an offset', block('106101'), 'a match is cut off'],
    ['more than the output', block('1f61' + '0100' + 'ff00'), 'runs past the end'],
    ['more literals than the output', block(`f0${'56'}${'61'.repeat(101)}`), 'run past the end'],
    ['a block longer than the data', 'ff000000', 'past the end'],
    ['a block of nothing', '00000000', 'past the end'],
    ['half a block size', '0100', 'cut off'],
  ])('%s', (_, hex, message) => {
    expect(() => decode(magic + hex)).toThrow(message);
  });
});

describe('xz', () => {
  const bytes = code.subarray(0, 300_000);
  const decode = (packed: Uint8Array) => {
    const out = new Uint8Array(bytes.length);
    return out.subarray(0, decodeXz(packed, out));
  };
  const xz = (...args: string[]) => execFileSync('xz', [...args, '-c'], { input: bytes, maxBuffer: 64 * MiB });

  test.each([
    ['no filter', ['--check=crc32']],
    ['no check', ['--check=none', '--x86', '--lzma2']],
    ['a start offset', ['--check=crc32', '--x86=start=4096', '--lzma2']],
    ['many blocks', ['--check=crc32', '--x86', '--lzma2', '--block-size=10000']],
    ['sizes in the block headers', ['-T2', '--check=crc32', '--x86', '--lzma2', '--block-size=100000']],
    ['other properties', ['--check=crc32', '--lzma2=lc=1,lp=3,pb=0']],
    ['pb=4', ['--check=crc32', '--lzma2=lc=0,lp=0,pb=4']],
    ['the fastest preset', ['--check=crc32', '-0']],
  ])('%s', (_, args) => expectSame(decode(xz(...args)), bytes));

  test('checks and filters the kernel does not use are refused by name', () => {
    expect(() => decode(xz('--check=sha256'))).toThrow('integrity check 10');
    expect(() => decode(xz('--check=crc32', '--arm', '--lzma2'))).toThrow('a filter other than x86');
    expect(() => decode(xz('--check=crc32', '--x86', '--x86', '--lzma2'))).toThrow('a filter other than x86');
  });

  test('the x86 filter leaves short data alone', () => {
    for (let length = 0; length <= 4; length++) {
      const bytes = new Uint8Array(length).fill(0xe8);
      undoX86Filter(bytes, 0);
      expect(bytes).toEqual(new Uint8Array(length).fill(0xe8));
    }
  });
});

describe('zstd', () => {
  const bytes = pattern(50_000);
  const decode = (packed: Uint8Array, size = bytes.length) => {
    const out = new Uint8Array(size);
    return out.subarray(0, decodeZstd(packed, out));
  };
  const zstd = (...args: string[]) => execFileSync('zstd', [...args, '-q', '-c'], { input: bytes });

  test.each([['-1'], ['-19'], ['--no-check'], ['--fast=5'], [`--stream-size=${bytes.length}`], ['--long=27']])(
    '%s',
    (arg) => expectSame(decode(zstd(arg)), bytes),
  );

  test('one frame, and nothing after it', () => {
    const frame = zstd('-3');
    expect(() => decode(Buffer.concat([frame, frame]))).toThrow(`the frame has ${frame.length} bytes`);
    expect(() => decode(Buffer.concat([frame, new Uint8Array(1)]))).toThrow('the frame has');
    expect(() => decode(frame.subarray(0, -1))).toThrow();
  });

  test('more or less data than the size says', () => {
    expect(() => decode(zstd('-3'), bytes.length - 1)).toThrow('checksum');
    expect(() => decode(zstd('-3'), bytes.length + 1)).toThrow('checksum');
  });
});

test('crc32 and xxh64 give the published values', () => {
  expect(crc32(Buffer.from('123456789'))).toBe(0xcbf43926);
  expect(crc32(new Uint8Array())).toBe(0);
  // xxHash's own test vectors.
  expect(xxh64(new Uint8Array())).toBe(0xef46db3751d8e999n);
  expect(xxh64(Buffer.from('abc'))).toBe(0x44bc2cf5ad770999n);
  expect(xxh64(Buffer.from('Nobody inspects the spammish repetition'))).toBe(0xfbcea83c8a378bf1n);
});
