import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { cliPath } from './cli.js';

const tsvisor = (...args: string[]) => execFileSync(process.execPath, [cliPath, ...args], { encoding: 'utf8' }).trim();

/** Paths of the default guest's kernel and initramfs, which scripts/test has built. */
export function defaultGuest(): { kernel: string; initrd: string } {
  return { kernel: tsvisor('kernel', 'path'), initrd: tsvisor('initramfs', 'path') };
}

/** Path of the default root file system; read-only. */
export function rootfs(): string {
  return tsvisor('rootfs', 'path');
}

/**
 * The default guest's initramfs and one with more entries after it: Linux unpacks archives one after the other.
 * @param manifest lines for guest-images/init/cpio.mjs
 * @param folder for what is made here
 * @returns its path
 */
export function initramfsWith(folder: string, manifest: readonly string[]): string {
  const list = join(folder, 'manifest');
  writeFileSync(list, `${manifest.join('\n')}\n`);
  const extra = execFileSync(process.execPath, ['guest-images/init/cpio.mjs', list], { maxBuffer: 2 ** 28 });
  const combined = join(folder, 'initramfs.cpio');
  writeFileSync(combined, Buffer.concat([readFileSync(defaultGuest().initrd), extra]));
  return combined;
}

/** The default guest with programs of test/guest/programs, compiled, in its /bin. @param folder for what is made here. */
export function guestWithPrograms(folder: string, programs: readonly string[]): { kernel: string; initrd: string } {
  const manifest = programs.map((name) => {
    const binary = join(folder, name);
    execFileSync('gcc', ['-O2', '-mavx2', '-static', '-s', '-o', binary, `test/guest/programs/${name}.c`]);
    return `file bin/${name} 755 ${binary}`;
  });
  return { kernel: defaultGuest().kernel, initrd: initramfsWith(folder, manifest) };
}
