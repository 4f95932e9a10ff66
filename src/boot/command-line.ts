import { UsageError } from '../errors.js';
import { layout } from '../machine/layout.js';
import type { GuestMemory } from '../memory/guest-memory.js';

/** COMMAND_LINE_SIZE of Linux on x86 (arch/x86/include/asm/setup.h), 2048, less the NUL: for images that do not say. */
export const LINUX_COMMAND_LINE_SIZE = 2047;

/**
 * A command line as the guest reads it: UTF-8 and a NUL. UsageError if it has more bytes than the kernel takes, which
 * would cut it off without a word (boot.rst, "The Kernel Command Line").
 */
export function encodeCommandLine(text: string, limit: number): Uint8Array {
  if (text.includes('\0')) throw new UsageError('the kernel command line contains a NUL byte; remove it');
  const most = Math.min(limit, layout.commandLineLimit - 1);
  const size = Buffer.byteLength(text);
  if (size > most) {
    throw new UsageError(`the kernel command line has ${size} bytes, and this kernel takes ${most}; shorten it`);
  }
  return Buffer.from(`${text}\0`);
}

export function writeCommandLine(memory: GuestMemory, bytes: Uint8Array): void {
  memory.write(layout.commandLine, bytes);
}
