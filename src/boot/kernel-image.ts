import { ImageError, MemoryError } from '../errors.js';
import { layout } from '../machine/layout.js';
import { isBzImage, parseBzImage } from './bzimage.js';
import { LINUX_COMMAND_LINE_SIZE } from './command-line.js';
import { type Compression, canUnpack, compressionOf, unpack } from './decompress.js';
import { type Elf, isElf, parseElf, physicalEntry } from './elf.js';
import { ImageBuffer, type ImageBytes, readUpTo } from './image-file.js';
import type { Range } from './placement.js';
import { hex, mebibytes, sizeText } from './text.js';

/** How a guest is entered: Linux' 64-bit boot protocol (boot.rst), or PVH (Xen's docs/misc/pvh.pandoc), 32-bit. */
export type BootProtocol = 'linux64' | 'pvh';

/** Bytes of an image and where they go; what is beyond fileSize is zero. */
export interface Piece {
  readonly offset: number;
  readonly fileSize: number;
  readonly gpa: number;
  readonly size: number;
}

/** A kernel that is understood, and nothing of it written yet. */
export interface KernelImage {
  /** `vmlinux` is an ELF that says it is Linux. */
  readonly format: 'vmlinux' | 'elf' | 'bzImage';
  readonly protocol: BootProtocol;
  /** How a bzImage's payload is packed, and who unpacks it. */
  readonly compression?: Compression;
  readonly unpackedBy?: 'host' | 'guest';
  readonly entry: number;
  readonly bytes: ImageBytes;
  readonly pieces: readonly Piece[];
  /** RAM it needs for itself. */
  readonly needs: readonly Range[];
  readonly setupHeader?: Uint8Array;
  readonly commandLineLimit: number;
  /** The last address that an initrd may use. */
  readonly initrdAddressMax: number;
}

/** What a bare vmlinux takes: initrd_addr_max of every x86 bzImage (arch/x86/boot/header.S). */
const LINUX_INITRD_ADDRESS_MAX = 0x7fff_ffff;

/**
 * Finds out what a kernel file is and how to boot it, and unpacks it if it is packed.
 * @param memorySize guest RAM: a payload that would not fit is not unpacked
 */
export async function readKernel(
  file: ImageBytes,
  memorySize: number,
  protocol: BootProtocol | 'auto',
): Promise<KernelImage> {
  const head = readUpTo(file, 0, 1024);
  if (isElf(head)) return fromElf(file, protocol);
  if (isBzImage(head)) return await fromBzImage(file, memorySize, protocol);
  throw new ImageError(
    `${file.name}: ${describe(head)}; name a vmlinux, a bzImage (vmlinuz) or an ELF with a PVH note`,
  );
}

function fromElf(bytes: ImageBytes, wanted: BootProtocol | 'auto'): KernelImage {
  const elf = parseElf(bytes);
  const protocol = wanted === 'auto' ? protocolOf(elf) : wanted;
  const needs = elf.segments.map(({ gpa, size }) => ({ start: gpa, end: gpa + size }));
  return {
    format: elf.isLinux ? 'vmlinux' : 'elf',
    protocol,
    entry: entryOf(bytes.name, elf, protocol),
    bytes,
    pieces: elf.segments,
    needs,
    commandLineLimit: LINUX_COMMAND_LINE_SIZE,
    initrdAddressMax: elf.isLinux ? LINUX_INITRD_ADDRESS_MAX : layout.mmioHoleStart - 1,
  };
}

/** Linux goes by its 64-bit entry even where it has a PVH one: that is less to execute before it is in long mode. */
function protocolOf(elf: Elf): BootProtocol {
  return elf.pvhEntry !== undefined && !(elf.isLinux && elf.is64) ? 'pvh' : 'linux64';
}

function entryOf(name: string, elf: Elf, protocol: BootProtocol): number {
  if (protocol === 'pvh') {
    const { pvhEntry } = elf;
    if (pvhEntry === undefined) {
      throw new ImageError(`${name}: has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY); boot it by another protocol`);
    }
    if (elf.segments.some(({ gpa, size }) => pvhEntry >= gpa && pvhEntry < gpa + size)) return pvhEntry;
    throw new ImageError(`${name}: its PVH entry ${hex(pvhEntry)} is in no segment; link it again`);
  }
  if (!elf.is64) {
    throw new ImageError(`${name}: is a 32-bit ELF without a PVH note; tsvisor boots x86-64 kernels`);
  }
  const entry = physicalEntry(elf);
  if (entry === undefined) {
    throw new ImageError(`${name}: its entry point ${hex(elf.entry)} is in no segment; link it again`);
  }
  if (entry >= layout.mmioHoleEnd) {
    throw new ImageError(
      `${name}: its entry point is at ${hex(entry)}, and only the first 4 GiB are mapped; link it lower`,
    );
  }
  return entry;
}

async function fromBzImage(
  file: ImageBytes,
  memorySize: number,
  protocol: BootProtocol | 'auto',
): Promise<KernelImage> {
  const image = parseBzImage(file);
  const { payload, setupHeader, loadAddress, initSize } = image;
  const common = {
    format: 'bzImage' as const,
    setupHeader,
    commandLineLimit: image.commandLineSize,
    initrdAddressMax: image.initrdAddressMax,
  };
  const compression = payload ? compressionOf(readUpTo(file, payload.offset, 8)) : 'unknown';
  if (payload && canUnpack(compression)) {
    // Unpacked, it needs no more room than what the header sets aside for it to unpack itself.
    if (initSize > memorySize) {
      const needed = mebibytes(loadAddress + initSize);
      throw new MemoryError(
        `${file.name}: needs more than the machine's ${sizeText(memorySize)} of memory; give it at least ${needed}`,
      );
    }
    const packed = readUpTo(file, payload.offset, payload.size);
    const vmlinux = new ImageBuffer(file.name, await unpack(file.name, compression, packed, initSize));
    if (!isElf(readUpTo(vmlinux, 0, 4))) {
      throw new ImageError(`${file.name}: its ${compression} payload is no ELF; copy or build it again`);
    }
    return { ...fromElf(vmlinux, protocol), ...common, compression, unpackedBy: 'host' };
  }
  if (protocol === 'pvh') {
    throw new ImageError(`${file.name}: its ${compression} payload cannot be unpacked for PVH; boot it by linux64`);
  }
  return {
    ...common,
    protocol: 'linux64',
    compression,
    unpackedBy: 'guest',
    entry: image.entry,
    bytes: file,
    pieces: [{ offset: image.codeOffset, fileSize: image.codeSize, gpa: loadAddress, size: image.codeSize }],
    needs: [{ start: loadAddress, end: loadAddress + initSize }],
  };
}

/** What a file that is no kernel is, where its beginning tells. */
function describe(head: Uint8Array): string {
  // Documentation/arch/arm64/booting.rst: the magic "ARM\x64" at byte 56.
  if (String.fromCharCode(...head.subarray(56, 60)) === 'ARMd') return 'is an arm64 Image, not an x86-64 kernel';
  const compression = compressionOf(head);
  if (compression !== 'unknown') return `is ${compression} data by itself, not a kernel: unpack it first`;
  return 'is neither an ELF nor a bzImage';
}
