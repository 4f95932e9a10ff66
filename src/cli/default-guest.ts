import { spawn } from 'node:child_process';
import { readdirSync, statSync } from 'node:fs';
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

/** Every flavour, with the path and size of its kernel where it is built. */
export async function listKernels(): Promise<{ flavour: string; path?: string; bytes?: number }[]> {
  const flavours = readdirSync(`${images}kernel`)
    .filter((name) => name.endsWith('.config') && name !== 'base.config')
    .map((name) => name.slice(0, -'.config'.length));
  return Promise.all(
    flavours.map(async (flavour) => {
      const path = await imagePath('build-kernel.sh', ['--flavour', flavour, '--cached']);
      return path === '' ? { flavour } : { flavour, path, bytes: statSync(path).size };
    }),
  );
}
