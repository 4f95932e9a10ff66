import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, renameSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

const cache = join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'tsvisor', 'test-guests');

/** Ports of layout.ts, for assembly. */
const PRELUDE = `
.intel_syntax noprefix
.set DEBUG_EXIT, 0xf4
.set BOOT_TIMER, 0xf8
.set I8042, 0x64
.set SLEEP_CONTROL, 0x600
.set SERIAL, 0x3f8
.globl _start
.text
_start:
`;

/** Links x86-64 assembly (Intel syntax; it starts in long mode at 1 MiB) into an ELF and returns its path. */
export function guestProgram(assembly: string): string {
  const source = `${PRELUDE}${assembly}\n`;
  const path = join(cache, `${createHash('sha256').update(source).digest('hex').slice(0, 24)}.elf`);
  if (existsSync(path)) return path;
  mkdirSync(cache, { recursive: true });
  const temporary = `${path}.${process.pid}`;
  const flags = [
    '-nostdlib',
    '-static',
    '-no-pie',
    '-Wl,-N,--no-warn-rwx-segments,--build-id=none,-z,noexecstack,-Ttext=0x100000',
  ];
  execFileSync('gcc', [...flags, '-x', 'assembler', '-', '-o', temporary], { input: source });
  renameSync(temporary, path);
  return path;
}
