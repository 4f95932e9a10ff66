import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync } from 'node:fs';
import { homedir } from 'node:os';
import { basename, join } from 'node:path';

/** Guests are linked here, above what a boot protocol keeps below 1 MiB; ld puts the ELF header into the page before. */
const GUEST_ADDRESS = '0x200000';

const GUEST_FLAGS = ['-nostdlib', '-static', '-ffreestanding', `-Wl,-Ttext=${GUEST_ADDRESS}`, '-Wl,--build-id=none'];
const C_FLAGS = ['-O2', '-Wall', '-Wextra', '-Werror'];
/** No registers that a kernel would have to set up first, and nothing that calls a library. */
const GUEST_C_FLAGS = [
  ...['-mgeneral-regs-only', '-fno-pie', '-fno-stack-protector', '-fcf-protection=none'],
  ...['-fno-asynchronous-unwind-tables', '-fno-tree-loop-distribute-patterns'],
];

/** Compiles guests/NAME to a 64-bit ELF that a VMM can boot. @returns its path. */
export function compileGuest(name: string, defines: Readonly<Record<string, number>> = {}): string {
  const flags = Object.entries(defines).map(([key, value]) => `-D${key}=${value}`);
  return compile(join(import.meta.dirname, 'guests', name), [...GUEST_FLAGS, ...flags]);
}

/** Compiles guests/NAME, which is C, to an ELF that runs in user mode from user-mode.S on. @returns its path. */
export function compileUserGuest(name: string): string {
  const folder = join(import.meta.dirname, 'guests');
  return compile(join(folder, name), [...GUEST_FLAGS, ...C_FLAGS, ...GUEST_C_FLAGS], join(folder, 'user-mode.S'));
}

/** Compiles reference/NAME to a program for this host. @param flags of the compiler, beside those for all. @returns its path. */
export function compileReference(name: string, flags: readonly string[] = []): string {
  return compile(join(import.meta.dirname, 'reference', name), [...C_FLAGS, ...flags]);
}

/** Compiled once for each content of the sources and set of flags, and kept in the user's cache directory. */
function compile(source: string, flags: readonly string[], ...others: readonly string[]): string {
  const folder = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tsvisor', 'bench');
  const contents = Buffer.concat([source, ...others].map((path) => readFileSync(path)));
  const hash = createHash('sha256').update(JSON.stringify(flags)).update(contents).digest('hex');
  const output = join(folder, `${basename(source).replace(/\..*$/, '')}-${hash.slice(0, 16)}`);
  if (existsSync(output)) return output;
  mkdirSync(folder, { recursive: true });
  const unfinished = `${output}.${process.pid}`;
  try {
    const command = [...flags, source, ...others, '-o', unfinished];
    execFileSync('gcc', command, { stdio: ['ignore', 'pipe', 'pipe'], encoding: 'utf8' });
  } catch (error) {
    const { code, stderr } = error as { code?: string; stderr?: string };
    if (code === 'ENOENT') throw new Error('gcc: not found; install it to compile the guests of the benches');
    throw new Error(`gcc cannot compile ${source}:\n${stderr}`);
  }
  renameSync(unfinished, output);
  return output;
}
