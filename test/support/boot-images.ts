import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { elf32_hdr, elf32_phdr, elf64_hdr, elf64_phdr, setup_header as hdr } from '#dist/kvm/generated/abi.js';
import { GuestMemory } from '#dist/memory/guest-memory.js';

const KiB = 1024;
export const MiB = 1024 * KiB;
export const GiB = 1024 * MiB;

/** Guest RAM from 0, in one region. */
export function ram(size: number): GuestMemory {
  return new GuestMemory([{ gpa: 0, buffer: new ArrayBuffer(size) }]);
}

/** Bytes that are cheap to make, do not repeat soon, and compress somewhat. */
export function pattern(size: number, seed = 1): Uint8Array {
  const bytes = new Uint8Array(size);
  let state = seed;
  for (let i = 0; i < size; i++) {
    if (i % 7 === 0) state = (Math.imul(state, 1103515245) + 12345) | 0;
    bytes[i] = state >>> 24;
  }
  return bytes;
}

export interface ElfSegment {
  paddr?: number | bigint;
  vaddr?: number | bigint;
  data?: Uint8Array;
  memsz?: number | bigint;
  filesz?: number | bigint;
  offset?: number | bigint;
  type?: number;
  align?: number;
}

export interface ElfNote {
  name: string;
  type: number;
  description: Uint8Array;
}

export interface ElfOptions {
  bits?: 32 | 64;
  entry?: number | bigint;
  machine?: number;
  type?: number;
  segments?: ElfSegment[];
  notes?: ElfNote[];
  phnum?: number;
  phentsize?: number;
  phoff?: number | bigint;
}

export const linuxNote: ElfNote = { name: 'Linux', type: 0x100, description: Uint8Array.of(0) };

/** XEN_ELFNOTE_PHYS32_ENTRY, in 8 bytes as Linux has it or in 4. */
export function pvhNote(entry: number, size: 4 | 8 = 8): ElfNote {
  const description = new Uint8Array(size);
  new DataView(description.buffer).setUint32(0, entry, true);
  return { name: 'Xen', type: 18, description };
}

/** An ELF with the segments' bytes after the headers, by default one of 16 bytes at 1 MiB that is also the entry. */
export function buildElf(options: ElfOptions = {}): Buffer {
  const { bits = 64, machine = bits === 64 ? 62 : 3, type = 2 } = options;
  const [ehdr, phdr] = bits === 64 ? [elf64_hdr, elf64_phdr] : [elf32_hdr, elf32_phdr];
  const segments: ElfSegment[] = [...(options.segments ?? [{ paddr: MiB, data: pattern(16) }])];
  if (options.notes) segments.push({ type: 4, align: 4, data: buildNotes(options.notes) });
  const dataStart = ehdr.sizeof + segments.length * phdr.sizeof;
  const file = Buffer.alloc(dataStart + segments.reduce((sum, s) => sum + (s.data?.length ?? 0), 0));
  const word = (at: number, value: number | bigint) =>
    bits === 64 ? file.writeBigUInt64LE(BigInt(value), at) : file.writeUInt32LE(Number(value), at);

  file.writeUInt32BE(0x7f454c46, 0);
  file.set([bits / 32, 1, 1], 4);
  file.writeUInt16LE(type, ehdr.e_type);
  file.writeUInt16LE(machine, ehdr.e_machine);
  word(ehdr.e_entry, options.entry ?? segments[0]?.paddr ?? 0);
  word(ehdr.e_phoff, options.phoff ?? ehdr.sizeof);
  file.writeUInt16LE(options.phentsize ?? phdr.sizeof, ehdr.e_phentsize);
  file.writeUInt16LE(options.phnum ?? segments.length, ehdr.e_phnum);
  let offset = dataStart;
  segments.forEach((segment, i) => {
    const at = ehdr.sizeof + i * phdr.sizeof;
    const data = segment.data ?? new Uint8Array();
    file.writeUInt32LE(segment.type ?? 1, at + phdr.p_type);
    word(at + phdr.p_offset, segment.offset ?? offset);
    word(at + phdr.p_vaddr, segment.vaddr ?? segment.paddr ?? 0);
    word(at + phdr.p_paddr, segment.paddr ?? 0);
    word(at + phdr.p_filesz, segment.filesz ?? data.length);
    word(at + phdr.p_memsz, segment.memsz ?? data.length);
    word(at + phdr.p_align, segment.align ?? 4096);
    file.set(data, offset);
    offset += data.length;
  });
  return file;
}

function buildNotes(notes: readonly ElfNote[]): Buffer {
  const pad = (bytes: Buffer) => Buffer.concat([bytes, Buffer.alloc(-bytes.length & 3)]);
  return Buffer.concat(
    notes.map(({ name, type, description }) => {
      const head = Buffer.alloc(12);
      head.writeUInt32LE(name.length + 1, 0);
      head.writeUInt32LE(description.length, 4);
      head.writeUInt32LE(type, 8);
      return Buffer.concat([head, pad(Buffer.from(`${name}\0`)), pad(Buffer.from(description))]);
    }),
  );
}

export interface BzImageOptions {
  payload: Uint8Array;
  version?: number;
  xloadflags?: number;
  setupSects?: number;
  cmdlineSize?: number;
  initrdAddrMax?: number;
  prefAddress?: bigint;
  alignment?: number;
  initSize?: number;
  syssize?: number;
  payloadOffset?: number;
  payloadLength?: number;
}

/** Where a test image's payload is in its protected-mode code. */
export const PAYLOAD_OFFSET = 0x300;

/** A bzImage as Linux 6.1 makes it: one setup sector, and code with the payload at 0x300. */
export function buildBzImage(options: BzImageOptions): Buffer {
  const setupSects = options.setupSects ?? 1;
  const codeOffset = ((setupSects || 4) + 1) * 512;
  const codeSize = Math.ceil((PAYLOAD_OFFSET + options.payload.length) / 16) * 16;
  const file = Buffer.alloc(codeOffset + codeSize);
  const at = (field: Exclude<keyof typeof hdr, 'sizeof'>) => 0x1f1 + hdr[field];
  file.writeUInt8(setupSects, at('setup_sects'));
  file.writeUInt32LE(options.syssize ?? codeSize / 16, at('syssize'));
  file.writeUInt16LE(0xaa55, at('boot_flag'));
  file.writeUInt16LE(0x6aeb, at('jump'));
  file.write('HdrS', at('header'));
  file.writeUInt16LE(options.version ?? 0x020f, at('version'));
  file.writeUInt8(1, at('loadflags'));
  file.writeUInt32LE(options.initrdAddrMax ?? 0x7fffffff, at('initrd_addr_max'));
  file.writeUInt32LE(options.alignment ?? 0x200000, at('kernel_alignment'));
  file.writeUInt8(1, at('relocatable_kernel'));
  file.writeUInt16LE(options.xloadflags ?? 0x7f, at('xloadflags'));
  file.writeUInt32LE(options.cmdlineSize ?? 2047, at('cmdline_size'));
  file.writeUInt32LE(options.payloadOffset ?? PAYLOAD_OFFSET, at('payload_offset'));
  file.writeUInt32LE(options.payloadLength ?? options.payload.length, at('payload_length'));
  file.writeBigUInt64LE(options.prefAddress ?? 0x1000000n, at('pref_address'));
  file.writeUInt32LE(options.initSize ?? 4 * MiB, at('init_size'));
  file.fill(0xf4, codeOffset, codeOffset + PAYLOAD_OFFSET); // hlt
  file.set(options.payload, codeOffset + PAYLOAD_OFFSET);
  return file;
}

/** The commands of Linux' scripts/Makefile.lib that pack a payload (scripts/xz_wrap.sh for xz), and their packages. */
const packers = {
  gzip: { command: ['gzip', '-n', '-f', '-9'], package: 'gzip', appendsSize: false },
  lz4: { command: ['lz4', '-l', '-9', '-', '-'], package: 'lz4', appendsSize: true },
  zstd: { command: ['zstd', '-22', '--ultra', '-q'], package: 'zstd', appendsSize: true },
  xz: {
    command: ['xz', '--check=crc32', '--x86', '--lzma2=dict=32MiB', '-c'],
    package: 'xz-utils',
    appendsSize: true,
  },
  bzip2: { command: ['bzip2', '-9'], package: 'bzip2', appendsSize: true },
} as const;

/** Packs bytes as the kernel's build does. */
export function pack(format: keyof typeof packers, bytes: Uint8Array, command?: readonly string[]): Buffer {
  const packer = packers[format];
  const [tool = '', ...args] = command ?? packer.command;
  let packed: Buffer;
  try {
    packed = execFileSync(tool, args, { input: bytes, maxBuffer: 256 * MiB, stdio: ['pipe', 'pipe', 'ignore'] });
  } catch (error) {
    const missing = error instanceof Error && 'code' in error && error.code === 'ENOENT';
    const remedy = missing ? `is missing: apt-get install ${packer.package}` : 'failed';
    throw new Error(`${tool} ${remedy}`, { cause: error });
  }
  if (!packer.appendsSize) return packed;
  const size = Buffer.alloc(4);
  size.writeUInt32LE(bytes.length);
  return Buffer.concat([packed, size]);
}

/** Files in a directory of their own, which `dispose` removes. */
export class ImageDirectory {
  readonly path = mkdtempSync(join(tmpdir(), 'tsvisor-boot-'));

  file(name: string, bytes: Uint8Array): string {
    const path = join(this.path, name);
    writeFileSync(path, bytes);
    return path;
  }

  dispose(): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** A seeded generator of integers below `bound` (mulberry32). */
export function randomIntegers(seed: number): (bound: number) => number {
  let state = seed;
  return (bound) => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % bound;
  };
}
