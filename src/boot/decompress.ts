import { ImageError, MemoryError, TsvisorError } from '../errors.js';
import { sizeText } from './text.js';

/** How a bzImage's payload is packed. tsvisor unpacks the first five; the others the guest has to unpack itself. */
export type Compression = 'none' | 'gzip' | 'lz4' | 'zstd' | 'xz' | 'bzip2' | 'lzma' | 'lzo' | 'unknown';
type Unpacked = Exclude<Compression, 'bzip2' | 'lzma' | 'lzo' | 'unknown'>;

// boot.rst, payload_offset: the format is told by the standard magic numbers. LZO: lib/decompress.c in Linux.
const MAGICS: [Compression, number[]][] = [
  ['gzip', [0x1f, 0x8b]],
  ['lz4', [0x02, 0x21, 0x4c, 0x18]],
  ['zstd', [0x28, 0xb5, 0x2f, 0xfd]],
  ['xz', [0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00]],
  ['bzip2', [0x42, 0x5a, 0x68]],
  ['lzma', [0x5d, 0x00, 0x00]],
  ['lzo', [0x89, 0x4c, 0x5a, 0x4f]],
  ['none', [0x7f, 0x45, 0x4c, 0x46]],
];

/** The format of data, by its first bytes. */
export function compressionOf(bytes: Uint8Array): Compression {
  return MAGICS.find(([, magic]) => magic.every((byte, i) => bytes[i] === byte))?.[0] ?? 'unknown';
}

export function canUnpack(compression: Compression): compression is Unpacked {
  return compression === 'none' || compression in decoders;
}

/**
 * Unpacks `payload`, a bzImage's. All but gzip have the unpacked size in four bytes after the data (size_append in Linux'
 * scripts/Makefile.lib); for gzip these are its own ISIZE, and part of the data.
 * @param name what errors call it
 * @param limit the most bytes it may unpack to
 */
export async function unpack(
  name: string,
  compression: Unpacked,
  payload: Uint8Array,
  limit: number,
): Promise<Uint8Array> {
  if (compression === 'none') return payload;
  const sizeAt = payload.length - 4;
  if (sizeAt < 4) throw new ImageError(`${name}: its payload has only ${payload.length} bytes; copy or build it again`);
  const size = new DataView(payload.buffer, payload.byteOffset).getUint32(sizeAt, true);
  if (size === 0 || size > limit) {
    throw new ImageError(
      `${name}: its ${compression} payload says it unpacks to ${sizeText(size)} where the header allows ${sizeText(limit)}; copy or build it again`,
    );
  }
  const decode = await decoders[compression]();
  const corrupt = (why: string, cause?: unknown) =>
    new ImageError(`${name}: its ${compression} payload is corrupt (${why}); copy or build it again`, { cause });
  let unpacked: Uint8Array;
  try {
    unpacked = decode(compression === 'gzip' ? payload : payload.subarray(0, sizeAt), size);
  } catch (error) {
    if (error instanceof TsvisorError) throw error;
    throw corrupt(error instanceof Error ? error.message : String(error), error);
  }
  if (unpacked.length !== size) throw corrupt(`it unpacks to ${unpacked.length} bytes of ${size}`);
  return unpacked;
}

/** Unpacks what makes at most `size` bytes. */
type Decoder = (input: Uint8Array, size: number) => Uint8Array;

// Loaded only when an image needs it.
const decoders: Record<Exclude<Unpacked, 'none'>, () => Promise<Decoder>> = {
  gzip: async () => {
    const { gunzipSync } = await import('node:zlib');
    // One chunk of the whole size: the result is not put together from pieces.
    return (input, size) => gunzipSync(input, { maxOutputLength: size, chunkSize: Math.max(size + 1, 64) });
  },
  lz4: async () => into((await import('./decompress/lz4.js')).decodeLz4Legacy),
  zstd: async () => into((await import('./decompress/zstd.js')).decodeZstd),
  xz: async () => into((await import('./decompress/xz.js')).decodeXz),
};

/** Gives a decoder that fills a buffer, and says how far, its buffer. */
function into(decode: (input: Uint8Array, out: Uint8Array) => number): Decoder {
  return (input, size) => {
    const out = allocate(size);
    return out.subarray(0, decode(input, out));
  };
}

function allocate(size: number): Uint8Array {
  try {
    return new Uint8Array(size);
  } catch (error) {
    const message = `the host has no memory to unpack a kernel of ${sizeText(size)}; free some or use an unpacked vmlinux`;
    throw new MemoryError(message, { cause: error });
  }
}
