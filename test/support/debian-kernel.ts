import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { homedir } from 'node:os';
import { basename, join } from 'node:path';

const cache = join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'tsvisor', 'debian-kernel');

const run = (command: string, args: string[], cwd?: string) => execFileSync(command, args, { encoding: 'utf8', cwd });

export interface DebianKernel {
  /** Path of its bzImage. */
  readonly vmlinuz: string;
  /** Paths of its modules by name, such as `virtio-rng`. */
  readonly modules: ReadonlyMap<string, string>;
}

/** The kernel of Debian's linux-image-cloud-amd64, downloaded and unpacked once, not installed. */
export function debianCloudKernel(): DebianKernel {
  const name = /Depends: (linux-image-\S+)/.exec(run('apt-cache', ['depends', 'linux-image-cloud-amd64']))?.[1];
  if (!name) throw new Error('linux-image-cloud-amd64 is not known here; run: apt-get update');
  const folder = join(cache, name);
  if (!existsSync(folder)) {
    mkdirSync(cache, { recursive: true });
    const work = mkdtempSync(join(cache, '.download-'));
    try {
      run('apt-get', ['download', name], work);
      const debs = readdirSync(work).filter((file) => file.endsWith('.deb'));
      run('dpkg-deb', ['--extract', join(work, debs[0] as string), join(work, 'root')]);
      renameSync(join(work, 'root'), folder);
    } finally {
      rmSync(work, { recursive: true, force: true });
    }
  }
  const boot = join(folder, 'boot');
  const vmlinuz = readdirSync(boot).find((file) => file.startsWith('vmlinuz')) as string;
  const files = readdirSync(join(folder, 'lib', 'modules'), { recursive: true, encoding: 'utf8' });
  const modules = files.filter((file) => file.endsWith('.ko'));
  return {
    vmlinuz: join(boot, vmlinuz),
    modules: new Map(modules.map((file) => [basename(file, '.ko'), join(folder, 'lib', 'modules', file)])),
  };
}

/** Those modules and all they depend on, each after what it needs: the order for insmod. */
export function withDependencies(modules: DebianKernel['modules'], names: readonly string[]) {
  const ordered = new Map<string, { readonly name: string; readonly path: string }>();
  const add = (name: string) => {
    const path = modules.get(name);
    if (!path) throw new Error(`this kernel has no module ${name}`);
    // In its .modinfo section; modprobe takes it from modules.dep, which is made when a kernel is installed.
    const depends = /\0depends=([^\0]*)\0/.exec(readFileSync(path, 'latin1'))?.[1] ?? '';
    for (const other of depends.split(',').filter((text) => text !== '')) add(other);
    ordered.set(name, { name, path });
  };
  for (const name of names) add(name);
  return [...ordered.values()];
}
