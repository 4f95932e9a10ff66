import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

const cache = join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'tsvisor', 'debian-kernel');

const run = (command: string, args: string[], cwd?: string) => execFileSync(command, args, { encoding: 'utf8', cwd });

/** The kernel of Debian's linux-image-cloud-amd64, downloaded and unpacked once, not installed: the path of its vmlinuz. */
export function debianCloudKernel(): string {
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
  const vmlinuz = readdirSync(join(folder, 'boot')).find((file) => file.startsWith('vmlinuz'));
  return join(folder, 'boot', vmlinuz as string);
}
