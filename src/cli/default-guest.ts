import { spawn } from 'node:child_process';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { TsvisorError } from '../errors.js';

const images = fileURLToPath(new URL('../../guest-images/', import.meta.url));

/**
 * Runs one of the scripts of guest-images/, which builds what is not in the cache yet, with its progress on stderr.
 * @returns the path it prints. @throws TsvisorError ERR_BUILD.
 */
function imagePath(script: string, args: readonly string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(`${images}${script}`, args, { stdio: ['ignore', 'pipe', 'inherit'] });
    let output = '';
    child.stdout.on('data', (chunk) => {
      output += chunk;
    });
    child.on('error', (error) => reject(new TsvisorError('ERR_BUILD', `${script}: ${error.message}`)));
    child.on('close', (code, signal) => {
      if (code === 0) resolve(output.trim());
      else reject(new TsvisorError('ERR_BUILD', `${script} failed (${signal ?? `exit ${code}`}); its reason is above`));
    });
  });
}

export const DEFAULT_FLAVOUR = 'tiny';

/** The path of a flavour's vmlinux, built if it is not cached. */
export function kernelPath(flavour = DEFAULT_FLAVOUR, source?: string): Promise<string> {
  return imagePath('build-kernel.sh', ['--flavour', flavour, ...(source === undefined ? [] : ['--source', source])]);
}

/** The path of the default initramfs, built if it is not cached. */
export function initramfsPath(): Promise<string> {
  return imagePath('build-initramfs.sh', []);
}

/** The path of the default root file system, built if it is not cached. @param size like 256M. */
export function rootfsPath(size: string): Promise<string> {
  return imagePath('build-rootfs.sh', ['--size', size]);
}

/** A flavour and the kernels built from it that are in the cache, newest first. */
export interface KernelListing {
  readonly flavour: string;
  readonly built: readonly { readonly path: string; readonly bytes: number; readonly builtAt: string }[];
}

/** Every flavour that can be built, with what is built of it. */
export function listKernels(): KernelListing[] {
  const cache = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tsvisor', 'kernel');
  const kept = existsSync(cache) ? readdirSync(cache) : [];
  return readdirSync(`${images}kernel`)
    .filter((name) => name.endsWith('.config') && name !== 'base.config')
    .map((name) => name.slice(0, -'.config'.length))
    .map((flavour) => ({
      flavour,
      built: kept
        .filter((name) => name.startsWith(`${flavour}-`) && /^[0-9a-f]{16}$/.test(name.slice(flavour.length + 1)))
        .map((name) => join(cache, name, 'vmlinux'))
        .filter((path) => existsSync(path))
        .map((path) => ({ path, bytes: statSync(path).size, builtAt: statSync(path).mtime.toISOString() }))
        .sort((a, b) => b.builtAt.localeCompare(a.builtAt)),
    }));
}
