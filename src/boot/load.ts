import { MemoryError } from '../errors.js';
import { layout } from '../machine/layout.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import { writeBootParams } from './boot-params.js';
import { encodeCommandLine, writeCommandLine } from './command-line.js';
import type { Compression } from './decompress.js';
import { ImageBuffer, ImageFile, readIntoGuest } from './image-file.js';
import { type BootProtocol, type KernelImage, readKernel } from './kernel-image.js';
import { memoryMap } from './memory-map.js';
import { checkKernel, placeInitrd, type Range } from './placement.js';
import { writePvhStartInfo } from './pvh.js';
import { sizeText } from './text.js';

export type { BootProtocol } from './kernel-image.js';

/** What to boot. */
export interface BootSource {
  /** Path of a vmlinux, a bzImage or another x86 ELF. */
  readonly kernel: string;
  /** Path of an initrd or initramfs; any content. */
  readonly initrd?: string | undefined;
  /** An archive to put before the initrd, or to be it: its length is a multiple of 4. */
  readonly initrdPrefix?: Uint8Array | undefined;
  readonly commandLine: string;
  /** How to enter it; `auto`, the default, goes by the image. */
  readonly protocol?: BootProtocol | 'auto' | undefined;
  /** Guest physical address of the RSDP, if the machine has ACPI tables; who writes them may do so before or after. */
  readonly rsdp?: number | undefined;
}

/** A kernel in guest memory, ready to be entered. */
export interface BootEntry {
  readonly protocol: BootProtocol;
  /** RIP for linux64, in 64-bit mode with paging; EIP for pvh, in 32-bit protected mode without. */
  readonly rip: number;
  /** Address of boot_params, for RSI (linux64), or hvm_start_info, for EBX (pvh). */
  readonly paramsGpa: number;
  readonly kernelFormat: KernelImage['format'];
  /** Of a bzImage: how its payload is packed, and who unpacks it. */
  readonly compression?: Compression | undefined;
  readonly unpackedBy?: 'host' | 'guest' | undefined;
  /** The end of the RAM that the kernel takes for itself. */
  readonly kernelEnd: number;
  readonly initrd?: Range | undefined;
}

/**
 * Loads a kernel, its initrd and its command line, and writes what the boot protocol hands over: boot_params or
 * hvm_start_info. Page tables, GDT, MP and ACPI tables and registers are the caller's. Everything is checked before anything is
 * written, but for a file that cannot be read to its end.
 *
 * Throws ImageError for a file that cannot be booted, MemoryError if it does not fit, UsageError for the command line.
 */
export async function loadKernel(memory: GuestMemory, source: BootSource): Promise<BootEntry> {
  if (!memory.contains(0, layout.baseMemoryEnd)) {
    throw new MemoryError(`the machine has ${sizeText(memory.size)} of memory; a kernel needs more than 1 MiB`);
  }
  const rsdp = source.rsdp ?? 0;
  const map = memoryMap(memory, rsdp !== 0);
  const kernelFile = new ImageFile('kernel', source.kernel);
  let initrdFile: ImageFile | undefined;
  try {
    if (source.initrd !== undefined) initrdFile = new ImageFile('initrd', source.initrd);
    const kernel = await readKernel(kernelFile, memory.size, source.protocol ?? 'auto');
    checkKernel(kernelFile.name, kernel.needs, map);
    const commandLine = encodeCommandLine(source.commandLine, kernel.commandLineLimit);
    let initrd: Range | undefined;
    const prefix = source.initrdPrefix && new ImageBuffer("the agent's archive", source.initrdPrefix);
    const parts = [prefix, initrdFile].filter((part) => part !== undefined);
    if (parts.length > 0) {
      const size = parts.reduce((sum, part) => sum + part.size, 0);
      const name = parts.map((part) => part.name).join(' and ');
      const start = placeInitrd(name, size, kernel.needs, kernel.initrdAddressMax, map);
      initrd = { start, end: start + size };
      let at = start;
      for (const part of parts) {
        readIntoGuest(part, 0, memory, at, part.size);
        at += part.size;
      }
    }

    for (const { offset, fileSize, gpa, size } of kernel.pieces) {
      readIntoGuest(kernel.bytes, offset, memory, gpa, fileSize);
      if (size > fileSize) memory.zero(gpa + fileSize, size - fileSize);
    }
    writeCommandLine(memory, commandLine);
    const loadAddress = Math.min(...kernel.pieces.map(({ gpa }) => gpa));
    const { protocol, entry, format, compression, unpackedBy } = kernel;
    const paramsGpa =
      protocol === 'pvh'
        ? writePvhStartInfo(memory, map, initrd, rsdp)
        : writeBootParams(memory, map, initrd, kernel.setupHeader, loadAddress, rsdp);
    const kernelEnd = Math.max(...kernel.needs.map(({ end }) => end));
    return { protocol, rip: entry, paramsGpa, kernelFormat: format, compression, unpackedBy, kernelEnd, initrd };
  } finally {
    kernelFile.close();
    initrdFile?.close();
  }
}
