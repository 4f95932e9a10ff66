import { execFileSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import {
  chmodSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { GuestFileSystem } from '#dist/agent/file-system.js';
import { HostAgent } from '../../support/host-agent.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();
let host: HostAgent;
let fs: GuestFileSystem;
/** A folder for each test: the agent's files are this host's. */
let here: string;

beforeAll(async () => {
  host = await HostAgent.start(folder);
  fs = host.agent().fs;
});
afterAll(() => host[Symbol.asyncDispose]());
beforeEach(() => {
  here = mkdtempSync(join(folder, 'case-'));
});

const missing = { code: 'ERR_GUEST_FILE', errno: 'ENOENT', message: expect.stringMatching(/ENOENT/) };

describe('files', () => {
  it('writes and reads any bytes, large and empty', async () => {
    const data = randomBytes((3 << 20) + 17);
    const path = join(here, 'data');
    await fs.writeFile(path, data);
    expect((await fs.readFile(path)).equals(data)).toBe(true);
    expect(readFileSync(path).equals(data)).toBe(true);
    await fs.writeFile(path, '');
    expect(await fs.readFile(path)).toHaveLength(0);
    expect(await fs.readFile(path, 'utf8')).toBe('');
    await fs.writeFile(path, 'grüße');
    expect(await fs.readFile(path, { encoding: 'utf8' })).toBe('grüße');
    expect(readdirSync(here)).toEqual(['data']);
  });

  it('streams both ways', async () => {
    async function* source() {
      for (let i = 0; i < 100; i++) yield Buffer.alloc(100_000, i);
    }
    await fs.writeFile(join(here, 'stream'), source());
    const hash = createHash('sha256');
    await pipeline(fs.createReadStream(join(here, 'stream')), hash);
    expect(hash.digest('hex')).toBe(
      createHash('sha256')
        .update(readFileSync(join(here, 'stream')))
        .digest('hex'),
    );
    const partly = fs.createReadStream(join(here, 'stream'));
    for await (const chunk of partly) {
      expect(chunk.length).toBeGreaterThan(0);
      break;
    }
  });

  it('keeps the mode of what it replaces, or sets the one it is told', async () => {
    const path = join(here, 'mode');
    await fs.writeFile(path, '1');
    expect(statSync(path).mode & 0o7777).toBe(0o644);
    chmodSync(path, 0o751);
    await fs.writeFile(path, '2');
    expect(statSync(path).mode & 0o7777).toBe(0o751);
    await fs.writeFile(path, '3', { mode: 0o4700 });
    expect(statSync(path).mode & 0o7777).toBe(0o4700);
  });

  it('replaces a file whole: until then, and after a failure, the old one is there', async () => {
    const path = join(here, 'atomic');
    writeFileSync(path, 'old');
    const reason = new Error('no more data');
    async function* broken() {
      yield Buffer.from('new');
      expect(readFileSync(path, 'utf8')).toBe('old');
      throw reason;
    }
    await expect(fs.writeFile(path, broken())).rejects.toBe(reason);
    await expect.poll(() => readdirSync(here)).toEqual(['atomic']);
    expect(readFileSync(path, 'utf8')).toBe('old');
  });

  it("writes a symbolic link's file, and devices and /proc in place", async () => {
    writeFileSync(join(here, 'target'), 'old');
    symlinkSync('target', join(here, 'link'));
    await fs.writeFile(join(here, 'link'), 'new');
    expect(readlinkSync(join(here, 'link'))).toBe('target');
    expect(readFileSync(join(here, 'target'), 'utf8')).toBe('new');
    await fs.writeFile('/dev/null', 'nothing');
    expect(statSync('/dev/null').isCharacterDevice()).toBe(true);
    expect(await fs.readFile('/proc/self/comm', { encoding: 'utf8' })).toMatch(/\n$/);
  });

  it('tells what cannot be done, and why', async () => {
    await expect(fs.readFile(join(here, 'none'))).rejects.toMatchObject(missing);
    await expect(fs.readFile(here)).rejects.toMatchObject({ errno: 'EISDIR' });
    await expect(fs.writeFile(here, 'x')).rejects.toMatchObject({ errno: 'EISDIR' });
    await expect(fs.writeFile(join(here, 'no', 'file'), Buffer.alloc(1 << 20))).rejects.toMatchObject(missing);
    await expect(fs.list(join(here, 'none'))).rejects.toMatchObject(missing);
    await expect(fs.stat(join(here, 'none'))).rejects.toMatchObject(missing);
    await expect(fs.mkdir(join(here, 'no', 'folder'))).rejects.toMatchObject(missing);
    await expect(fs.remove(join(here, 'none'))).rejects.toMatchObject(missing);
    await expect(fs.copyOut(join(here, 'none'), join(here, 'x'))).rejects.toMatchObject(missing);
    await expect(fs.readFile('a\0b')).rejects.toMatchObject({ code: 'ERR_USAGE' });
  });

  it('refuses what JavaScript can ask for and TypeScript cannot, by name', async () => {
    const wrong = undefined as never;
    for (const [attempt, message] of [
      [() => fs.readFile(''), 'path: is empty'],
      [() => fs.readFile('/etc/passwd', 'latin1' as never), 'encoding: latin1 is not utf8'],
      [() => fs.writeFile(join(here, 'x'), wrong), 'data: must be text, a Uint8Array, or a stream'],
      [() => fs.copyIn(here, ''), 'guestPath: is empty'],
      [() => fs.copyIn(wrong, join(here, 'x')), 'hostPath: must be a path'],
      [() => fs.copyOut(here, wrong), 'hostPath: must be a path'],
    ] as const) {
      await expect(attempt()).rejects.toMatchObject({ code: 'ERR_USAGE', message: expect.stringContaining(message) });
    }
    expect(existsSync(join(here, 'x'))).toBe(false);
  });

  it('reads no more than is allowed', async () => {
    await expect(fs.readFile('/dev/zero', { maxBytes: 100_000 })).rejects.toMatchObject({ errno: 'EFBIG' });
  });

  it('stops when it is aborted', async () => {
    const reason = new Error('enough');
    const controller = new AbortController();
    const reading = fs.createReadStream('/dev/zero', { signal: controller.signal });
    reading.once('data', () => controller.abort(reason));
    await expect(pipeline(reading, createHash('sha256'))).rejects.toBe(reason);
    await expect(fs.stat('/', { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });

  it('lists and describes files', async () => {
    writeFileSync(join(here, 'file'), '12345', { mode: 0o640 });
    utimesSync(join(here, 'file'), 1e9, 1234567890.5);
    symlinkSync('file', join(here, 'link'));
    mkdirSync(join(here, 'folder'));
    execFileSync('mkfifo', [join(here, 'fifo')]);
    const entries = (await fs.list(here)).sort((a, b) => a.name.localeCompare(b.name));
    expect(entries.map(({ name, type }) => [name, type])).toEqual([
      ['fifo', 'fifo'],
      ['file', 'file'],
      ['folder', 'directory'],
      ['link', 'symlink'],
    ]);
    expect(entries[3]?.target).toBe('file');
    const file = await fs.stat(join(here, 'link'));
    expect(file).toMatchObject({ name: 'link', type: 'file', mode: 0o640, size: 5, modified: new Date(1234567890500) });
    expect((await fs.stat(join(here, 'link'), { followSymlinks: false })).type).toBe('symlink');
  });

  it('makes and removes folders', async () => {
    const deep = join(here, 'a/b/c');
    await fs.mkdir(deep, { recursive: true, mode: 0o700 });
    await fs.mkdir(deep, { recursive: true });
    expect(statSync(deep).mode & 0o777).toBe(0o700);
    await expect(fs.mkdir(deep)).rejects.toMatchObject({ errno: 'EEXIST' });
    await expect(fs.remove(join(here, 'a'))).rejects.toMatchObject({ errno: 'ENOTEMPTY' });
    symlinkSync(deep, join(here, 'link'));
    writeFileSync(join(here, 'kept'), '');
    symlinkSync(here, join(deep, 'up'));
    for (let i = 0; i < 500; i++) writeFileSync(join(deep, `file ${i}`), '');
    await fs.remove(join(here, 'link'), { recursive: true });
    await fs.remove(join(here, 'a'), { recursive: true });
    expect(readdirSync(here)).toEqual(['kept']);
    await fs.remove(join(here, 'a'), { recursive: true, force: true });
  });
});

/** Everything of a tree that a copy keeps. */
function describeTree(root: string): string[] {
  const format = '%P\\0%y\\0%m\\0%s\\0%T@\\0%l\\0\\n';
  return execFileSync('find', [root, '-type', 'd', '-printf', '%P\\0%y\\0%m\\0%T@\\n', '-o', '-printf', format], {
    encoding: 'latin1',
  })
    .split('\n')
    .sort();
}

function makeTree(root: string): void {
  mkdirSync(join(root, 'sub/empty'), { recursive: true });
  writeFileSync(join(root, 'file'), randomBytes(100_000), { mode: 0o600 });
  writeFileSync(join(root, 'sub/run'), '#!/bin/sh\n');
  chmodSync(join(root, 'sub/run'), 0o755);
  writeFileSync(join(root, 'empty'), '');
  linkSync(join(root, 'file'), join(root, 'second'));
  symlinkSync('../file', join(root, 'sub/link'));
  symlinkSync('/etc/passwd', join(root, 'absolute'));
  symlinkSync('nowhere', join(root, 'dangling'));
  for (const name of ['a b', 'new\nline', '-rf', 'ü', '"$(x)"', 'x'.repeat(255)]) writeFileSync(join(root, name), name);
  writeFileSync(Buffer.concat([Buffer.from(`${root}/`), Buffer.from([0xff, 0xfe, 0x80])]), 'not UTF-8');
  chmodSync(join(root, 'sub/empty'), 0o500);
  // Node sets times as floating-point seconds: exact ones can be compared.
  execFileSync('find', [root, '-exec', 'touch', '-h', '-d', '@1234567890.25', '{}', '+']);
  utimesSync(join(root, 'sub'), 1e9, 1.1e9);
  execFileSync('touch', ['-d', '@-1.5', root]);
}

describe('copies of trees', () => {
  it.each(['copyIn', 'copyOut'] as const)('%s keeps contents, modes, times, links and odd names', async (copy) => {
    const from = join(here, 'from');
    makeTree(from);
    const paths: string[] = [];
    const summary = await fs[copy](from, join(here, 'to/there'), { onProgress: ({ path }) => paths.push(path) });
    expect(summary).toMatchObject({ directories: 3, files: 11, symlinks: 3, skipped: 0 });
    expect(paths).toContain('sub/run');
    expect(describeTree(join(here, 'to/there'))).toEqual(describeTree(from));
    expect(execFileSync('diff', ['-r', '--no-dereference', from, join(here, 'to/there')], { encoding: 'utf8' })).toBe(
      '',
    );
  });

  it.each(['copyIn', 'copyOut'] as const)('%s copies a single file, and follows a link to it', async (copy) => {
    writeFileSync(join(here, 'file'), 'text', { mode: 0o600 });
    symlinkSync('file', join(here, 'link'));
    await fs[copy](join(here, 'file'), join(here, 'new/folder/one'));
    await fs[copy](join(here, 'link'), join(here, 'new/two'));
    for (const path of ['new/folder/one', 'new/two']) {
      expect(readFileSync(join(here, path), 'utf8')).toBe('text');
      expect(lstatSync(join(here, path)).mode & 0o777).toBe(0o600);
    }
  });

  it.each(['copyIn', 'copyOut'] as const)('%s merges, replaces files and links, and follows none', async (copy) => {
    mkdirSync(join(here, 'from/folder'), { recursive: true });
    writeFileSync(join(here, 'from/folder/file'), 'new');
    writeFileSync(join(here, 'from/plain'), 'new');
    mkdirSync(join(here, 'outside'));
    writeFileSync(join(here, 'outside/file'), 'untouched');
    mkdirSync(join(here, 'to'));
    writeFileSync(join(here, 'to/other'), 'stays');
    symlinkSync(join(here, 'outside/file'), join(here, 'to/plain'));
    await fs[copy](join(here, 'from'), join(here, 'to'));
    expect(readFileSync(join(here, 'outside/file'), 'utf8')).toBe('untouched');
    expect(lstatSync(join(here, 'to/plain')).isFile()).toBe(true);
    expect(readFileSync(join(here, 'to/other'), 'utf8')).toBe('stays');
  });

  it('copyOut puts a folder where a link to another was; copyIn refuses', async () => {
    mkdirSync(join(here, 'from/folder'), { recursive: true });
    writeFileSync(join(here, 'from/folder/file'), 'new');
    mkdirSync(join(here, 'outside'));
    for (const to of ['in', 'out']) {
      mkdirSync(join(here, to));
      symlinkSync(join(here, 'outside'), join(here, to, 'folder'));
    }
    await fs.copyOut(join(here, 'from'), join(here, 'out'));
    await expect(fs.copyIn(join(here, 'from'), join(here, 'in'))).rejects.toMatchObject({ code: 'ERR_GUEST_FILE' });
    expect(readdirSync(join(here, 'outside'))).toEqual([]);
    expect(readFileSync(join(here, 'out/folder/file'), 'utf8')).toBe('new');
  });

  it('leaves out devices and FIFOs, and drops setuid on the way out', async () => {
    mkdirSync(join(here, 'from'));
    execFileSync('mkfifo', [join(here, 'from/fifo')]);
    writeFileSync(join(here, 'from/program'), '');
    chmodSync(join(here, 'from/program'), 0o6755);
    expect(await fs.copyOut(join(here, 'from'), join(here, 'out'))).toMatchObject({ skipped: 1, files: 1 });
    expect(await fs.copyIn(join(here, 'from'), join(here, 'in'))).toMatchObject({ skipped: 1, files: 1 });
    expect(readdirSync(join(here, 'out'))).toEqual(['program']);
    expect(statSync(join(here, 'out/program')).mode & 0o7777).toBe(0o755);
    expect(statSync(join(here, 'in/program')).mode & 0o7777).toBe(0o6755);
  });

  it.each(['copyIn', 'copyOut'] as const)('%s keeps its limits and leaves nothing half written', async (copy) => {
    mkdirSync(join(here, 'from'));
    writeFileSync(join(here, 'from/big'), Buffer.alloc(1_000_000));
    for (let i = 0; i < 10; i++) writeFileSync(join(here, `from/${i}`), '');
    const limited = (options: object) => fs[copy](join(here, 'from'), join(here, 'to'), options);
    await expect(limited({ maxBytes: 500_000 })).rejects.toMatchObject({ code: 'ERR_GUEST_FILE' });
    await expect(limited({ maxEntries: 5 })).rejects.toMatchObject({ code: 'ERR_GUEST_FILE' });
    await expect.poll(() => readdirSync(join(here, 'to')).filter((name) => name.startsWith('.tsvisor'))).toEqual([]);
    await limited({ maxBytes: 1_000_000, maxEntries: 12 });
  });

  it('stops when it is aborted', async () => {
    mkdirSync(join(here, 'from'));
    writeFileSync(join(here, 'from/big'), Buffer.alloc(10_000_000));
    for (const copy of ['copyIn', 'copyOut'] as const) {
      const controller = new AbortController();
      const reason = new Error('enough');
      const onProgress = ({ bytes }: { bytes: number }) => bytes > 0 && controller.abort(reason);
      const options = {
        signal: controller.signal,
        onProgress: (progress: { bytes: number }) => void onProgress(progress),
      };
      await expect(fs[copy](join(here, 'from'), join(here, copy), options)).rejects.toBe(reason);
      await expect.poll(() => readdirSync(join(here, copy))).toEqual([]);
    }
  });

  it('tells a failure in the guest while it sends', async () => {
    mkdirSync(join(here, 'from/a'), { recursive: true });
    writeFileSync(join(here, 'from/a/b'), Buffer.alloc(5_000_000));
    mkdirSync(join(here, 'to/a/b'), { recursive: true });
    await expect(fs.copyIn(join(here, 'from'), join(here, 'to'))).rejects.toMatchObject({ errno: 'EISDIR' });
    await expect(fs.copyIn(join(here, 'from'), join(here, 'from/a/b/c'))).rejects.toMatchObject({ errno: 'ENOTDIR' });
    expect(existsSync(join(here, 'from/a/b'))).toBe(true);
  });
});
