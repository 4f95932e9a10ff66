import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdirSync, readdirSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeEach, describe, expect, test } from 'vitest';
import {
  checkName,
  generateName,
  holderOf,
  isRunning,
  listMachines,
  MachineFolder,
  pathsOf,
} from '#dist/cli/machines/machine-folder.js';
import { cliPath } from '../../support/cli.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const base = temporaryFolder();
let runtime: string;
let count = 0;
beforeEach(() => {
  runtime = join(base, String(count++));
  mkdirSync(runtime);
  process.env.XDG_RUNTIME_DIR = runtime;
});

const usage = expect.objectContaining({ code: 'ERR_USAGE' });
const output = expect.objectContaining({ code: 'ERR_OUTPUT' });

/** Another process that has the name, until it is killed. */
async function otherProcess(name: string): Promise<ChildProcess> {
  const code = `
    import { MachineFolder } from ${JSON.stringify(new URL('../../../dist/cli/machines/machine-folder.js', import.meta.url))};
    await MachineFolder.claim(${JSON.stringify(name)});
    console.log('claimed');
    setInterval(() => {}, 1000);`;
  const child = spawn(process.execPath, ['--input-type=module', '-e', code], { stdio: ['ignore', 'pipe', 'inherit'] });
  await once(child.stdout as NodeJS.ReadableStream, 'data');
  return child;
}

async function kill(child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  child.kill(signal);
  await once(child, 'close');
}

describe('names', () => {
  test.each(['a', 'web', 'Web-2.old_x', '0', 'x'.repeat(32), generateName()])('%s is one', (name) => {
    expect(checkName(name)).toBe(name);
  });
  test.each(['', '.', '..', '.x', '-x', 'a/b', 'a:b', 'a b', 'x'.repeat(33), 'é', 'a\n', 'a\0'])(
    '%j is none',
    (name) => {
      expect(() => checkName(name)).toThrow(usage);
    },
  );
});

describe('a claim', () => {
  test('makes a folder of this user alone, which goes with it', async () => {
    const folder = await MachineFolder.claim('web');
    for (const path of [join(runtime, 'tsvisor'), folder.paths.folder]) expect(statSync(path).mode & 0o777).toBe(0o700);
    expect(isRunning('web')).toBe(true);
    expect(holderOf('web')?.pid).toBe(process.pid);
    writeFileSync(folder.paths.consoleLog, 'text');
    folder.release();
    expect(readdirSync(join(runtime, 'tsvisor'))).toEqual([]);
    expect(isRunning('web')).toBe(false);
  });

  test('of a name that another process has is refused, with the remedy', async () => {
    const other = await otherProcess('web');
    await expect(MachineFolder.claim('web')).rejects.toThrow(/'web' runs already.*tsvisor stop web/);
    await expect(MachineFolder.claim('web')).rejects.toEqual(usage);
    expect(await listMachines()).toEqual({ running: ['web'], failed: [] });
    expect(holderOf('web')?.pid).toBe(other.pid);
    await kill(other, 'SIGKILL');
  });

  test('takes over what a killed process left, and finds nothing of it', async () => {
    await kill(await otherProcess('web'), 'SIGKILL');
    writeFileSync(pathsOf('web').consoleLog, 'old');
    expect(existsSync(pathsOf('web').folder)).toBe(true);
    expect(isRunning('web')).toBe(false);
    expect(holderOf('web')).toBeUndefined();
    const folder = await MachineFolder.claim('web');
    expect(readdirSync(folder.paths.folder)).toEqual(['lock']);
    folder.release();
  });

  test('of many at once is one’s', async () => {
    const claims = await Promise.allSettled([1, 2, 3, 4].map(() => MachineFolder.claim('web')));
    const won = claims.filter((claim) => claim.status === 'fulfilled');
    expect(won).toHaveLength(1);
    won[0]?.value.release();
  });

  test('is handed over with the descriptor of its lock', async () => {
    const folder = await MachineFolder.claim('web');
    const child = spawn('sleep', ['1000'], { stdio: ['ignore', 'ignore', 'ignore', folder.lock] });
    folder.abandon();
    expect(isRunning('web')).toBe(true);
    await kill(child, 'SIGKILL');
    expect(isRunning('web')).toBe(false);
  });

  test('does not remove a folder that is another machine’s by now', async () => {
    const first = await MachineFolder.claim('web');
    rmSync(first.paths.folder, { recursive: true });
    expect(await listMachines()).toEqual({ running: [], failed: [] });
    const second = await MachineFolder.claim('web');
    first.release();
    expect(isRunning('web')).toBe(true);
    second.release();
    expect(existsSync(second.paths.folder)).toBe(false);
  });

  test('keeps what it is told to keep, for the list', async () => {
    const folder = await MachineFolder.claim('web');
    writeFileSync(folder.paths.failure, '{}');
    writeFileSync(folder.paths.control, '');
    folder.release({ keep: [folder.paths.failure] });
    expect(await listMachines()).toEqual({ running: [], failed: ['web'] });
    expect(readdirSync(folder.paths.folder).sort()).toEqual(['failure.json', 'lock']);
    (await MachineFolder.claim('web')).release();
    expect(await listMachines()).toEqual({ running: [], failed: [] });
  });
});

test('a path that is too long for sockets is refused', async () => {
  process.env.XDG_RUNTIME_DIR = join(runtime, 'long'.repeat(20));
  mkdirSync(process.env.XDG_RUNTIME_DIR);
  await expect(MachineFolder.claim('web')).rejects.toMatchObject({ message: expect.stringMatching(/XDG_RUNTIME_DIR/) });
});

const namespace = ['--user', '--map-root-user', '--mount'];
const mounts = spawnSync('unshare', [...namespace, 'true']).status === 0;

test.runIf(mounts)('a full disk is told in one line, whichever file does not fit', () => {
  for (const limit of ['nr_inodes=2', 'nr_inodes=3', 'nr_inodes=4', 'nr_inodes=5', 'size=4k']) {
    const script = `mount -t tmpfs -o ${limit} tmpfs "$0" && { head -c 4096 /dev/zero >"$0/filler"; exec "$@"; }`;
    const command = [process.execPath, cliPath, 'run', '--name', 'web', '--detach', '--kernel', '/none'];
    const arguments_ = [...namespace, 'sh', '-c', script, runtime, ...command];
    const { status, stderr } = spawnSync('unshare', arguments_, { encoding: 'utf8' });
    expect(stderr.replace(/^sh: .*\n|^head: .*\n/gm, '')).toMatch(/^tsvisor: cannot use [^\n]*ENOSPC\n$/);
    expect(status).toBe(73);
  }
});

test('the list removes what killed processes left, and nothing else', async () => {
  const root = join(runtime, 'tsvisor');
  expect(await listMachines()).toEqual({ running: [], failed: [] });
  const mine = await MachineFolder.claim('mine');
  await kill(await otherProcess('gone'), 'SIGKILL');
  mkdirSync(join(root, 'loose'), { mode: 0o755 });
  chmodSync(join(root, 'loose'), 0o755);
  expect(await listMachines()).toEqual({ running: ['mine'], failed: [] });
  expect(readdirSync(root).sort()).toEqual(['loose', 'mine']);
  mine.release();
});

describe('a folder that is not this user’s alone is refused', () => {
  const cases: [string, (root: string) => void][] = [
    ['open to others', (root) => mkdirSync(root) ?? chmodSync(root, 0o755)],
    ['a symbolic link', (root) => symlinkSync(join(base), root)],
    ['a file', (root) => writeFileSync(root, '')],
  ];
  test.each(cases)('all machines’: %s', async (_name, make) => {
    make(join(runtime, 'tsvisor'));
    await expect(MachineFolder.claim('web')).rejects.toEqual(output);
    expect(await listMachines()).toEqual({ running: [], failed: [] });
  });

  test.each(cases)('a machine’s: %s', async (_name, make) => {
    (await MachineFolder.claim('first')).release();
    make(pathsOf('web').folder);
    await expect(MachineFolder.claim('web')).rejects.toEqual(output);
    expect(isRunning('web')).toBe(false);
  });

  test('a lock that is a symbolic link', async () => {
    const victim = join(base, 'victim');
    writeFileSync(victim, 'mine');
    (await MachineFolder.claim('first')).release();
    mkdirSync(pathsOf('web').folder, { mode: 0o700 });
    symlinkSync(victim, join(pathsOf('web').folder, 'lock'));
    await expect(MachineFolder.claim('web')).rejects.toEqual(output);
    expect(statSync(victim).size).toBe(4);
  });

  test.runIf(process.geteuid?.() === 0)('another user’s', async () => {
    const root = join(runtime, 'tsvisor');
    mkdirSync(root, { mode: 0o700 });
    const { chownSync } = await import('node:fs');
    chownSync(root, 65534, 65534);
    await expect(MachineFolder.claim('web')).rejects.toEqual(output);
  });
});
