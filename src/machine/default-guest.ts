import { spawn } from 'node:child_process';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { TsvisorError } from '../errors.js';
import type { MachineConfig } from './config.js';

const images = fileURLToPath(new URL('../../guest-images/', import.meta.url));

/** Gets what a build says of its progress, a line at a time; without one it goes to stderr. */
export type BuildProgress = (line: string) => void;

/** What was built or found, by script and arguments: images are looked for once a process. */
const found = new Map<string, Promise<string>>();

/**
 * Runs one of the scripts of guest-images/, which builds what is not in the cache yet.
 * @returns the path it prints. @throws TsvisorError ERR_BUILD.
 */
function imagePath(script: string, args: readonly string[], progress?: BuildProgress): Promise<string> {
  const key = [script, ...args].join(' ');
  const path = found.get(key) ?? runScript(script, args, progress);
  found.set(key, path);
  path.catch(() => found.delete(key));
  return path;
}

function runScript(script: string, args: readonly string[], progress?: BuildProgress): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(`${images}${script}`, args, { stdio: ['ignore', 'pipe', progress ? 'pipe' : 'inherit'] });
    let output = '';
    let last = 'its reason is above';
    if (progress && child.stderr) {
      createInterface({ input: child.stderr }).on('line', (line) => {
        last = line;
        progress(line);
      });
    }
    child.stdout?.on('data', (chunk) => {
      output += chunk;
    });
    child.on('error', (error) => reject(new TsvisorError('ERR_BUILD', `${script}: ${error.message}`)));
    child.on('close', (code, signal) => {
      if (code === 0) resolve(output.trim());
      else reject(new TsvisorError('ERR_BUILD', `${script} failed (${signal ?? `exit ${code}`}): ${last}`));
    });
  });
}

export const DEFAULT_FLAVOUR = 'tiny';

/** The flavour for machines of so many vCPUs: a kernel for several takes half as long again to boot on one. */
export function flavourFor(cpus = 1): string {
  return cpus > 1 ? 'tiny-smp' : DEFAULT_FLAVOUR;
}

/** The path of a flavour's vmlinux, built if it is not cached. */
export function kernelPath(flavour = DEFAULT_FLAVOUR, source?: string, progress?: BuildProgress): Promise<string> {
  const args = ['--flavour', flavour, ...(source === undefined ? [] : ['--source', source])];
  return imagePath('build-kernel.sh', args, progress);
}

/** The path of the default initramfs, built if it is not cached. */
export function initramfsPath(progress?: BuildProgress): Promise<string> {
  return imagePath('build-initramfs.sh', [], progress);
}

/** The path of the agent's program, for images that have none, built if it is not cached. */
export function agentPath(progress?: BuildProgress): Promise<string> {
  return imagePath('build-agent.sh', [], progress);
}

/**
 * A configuration with images, with the program of the agent where theirs is not known to have one, and whether their init
 * is known to be the default guest's.
 */
export type ConfigWithImages = MachineConfig & {
  readonly kernel: string;
  readonly agentProgram?: string;
  readonly defaultInit?: boolean;
};

/** The configuration with the default guest's images, where it names none of its own. @throws TsvisorError ERR_BUILD */
export async function withDefaultGuest(
  config: MachineConfig,
  onLog: (level: 'info', message: string) => void = () => {},
): Promise<ConfigWithImages> {
  const progress = (line: string) => onLog('info', line);
  const images = await withImages(config, progress);
  const { kernel, initrd, append, agent } = config;
  const own = kernel !== undefined || initrd !== undefined || namesRoot(append);
  return own && agent ? { ...images, agentProgram: await agentPath(progress) } : images;
}

async function withImages(config: MachineConfig, progress: BuildProgress): Promise<ConfigWithImages> {
  const { kernel, initrd, append } = config;
  if (kernel !== undefined) return { ...config, kernel };
  const images = { kernel: await kernelPath(flavourFor(config.cpus), undefined, progress) };
  if (initrd !== undefined || namesRoot(append)) return { ...config, ...images };
  const agent = config.agent ?? config.vsock !== false;
  return { ...config, ...images, agent, initrd: await initramfsPath(progress), defaultInit: true };
}

/** Whether a command line names a root file system: then the default initramfs, which is one, is not wanted. */
export function namesRoot(append = ''): boolean {
  return /(^|\s)root=/.test(append);
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
