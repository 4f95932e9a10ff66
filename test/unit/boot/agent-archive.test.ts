import { execFileSync } from 'node:child_process';
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { agentArchive, appendAgentInit } from '#dist/boot/agent-archive.js';
import { loadKernel } from '#dist/boot/load.js';
import { commandLine } from '#dist/machine/command-line.js';
import { resolveConfig } from '#dist/machine/config.js';
import { buildElf, linuxNote, MiB, pattern, ram } from '../../support/boot-images.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();

function file(name: string, bytes: Uint8Array): string {
  const path = join(folder, name);
  writeFileSync(path, bytes);
  return path;
}

describe('the archive', () => {
  it('holds the program, and is padded so that another may follow', () => {
    for (const size of [0, 1, 4001, 4002, 4003, 4004]) {
      const program = file('program', pattern(size));
      const archive = agentArchive(program);
      expect(archive.length % 4).toBe(0);
      execFileSync('/bin/busybox', ['cpio', '-idu'], {
        cwd: folder,
        input: archive,
        stdio: ['pipe', 'ignore', 'ignore'],
      });
      const unpacked = join(folder, '.tsvisor-agent');
      expect(readFileSync(unpacked).equals(readFileSync(program))).toBe(true);
      expect(statSync(unpacked).mode & 0o777).toBe(0o755);
    }
  });

  it('goes before the initrd, or is it', async () => {
    const elf = buildElf({ entry: 2 * MiB, segments: [{ paddr: 2 * MiB, data: pattern(5000) }], notes: [linuxNote] });
    const kernel = file('kernel', elf);
    const initrd = file('initrd', pattern(5000, 7));
    const initrdPrefix = agentArchive(file('program', pattern(9000, 3)));
    const memory = ram(16 * MiB);
    const both = (await loadKernel(memory, { kernel, initrd, initrdPrefix, commandLine: '' })).initrd;
    if (!both) throw new Error('no initrd');
    expect(both.end - both.start).toBe(initrdPrefix.length + 5000);
    const expected = Buffer.concat([initrdPrefix, pattern(5000, 7)]);
    expect(expected.equals(memory.slice(both.start, expected.length))).toBe(true);
    const alone = (await loadKernel(memory, { kernel, initrdPrefix, commandLine: '' })).initrd;
    expect(initrdPrefix.equals(memory.slice(alone?.start ?? 0, initrdPrefix.length))).toBe(true);
    const tooLarge = loadKernel(memory, { kernel, initrd, initrdPrefix: new Uint8Array(16 * MiB), commandLine: '' });
    await expect(tooLarge).rejects.toMatchObject({ code: 'ERR_MEMORY', message: expect.stringContaining(initrd) });
  });
});

describe('the command line', () => {
  it.each([
    ['', 'rdinit=/.tsvisor-agent'],
    ['root=/dev/vda rw', 'root=/dev/vda rw rdinit=/.tsvisor-agent'],
    ['rdinit=/mine -- one two', 'rdinit=/mine rdinit=/.tsvisor-agent -- one two'],
    ['-- one', 'rdinit=/.tsvisor-agent -- one'],
    ['a -- b -- c', 'a rdinit=/.tsvisor-agent -- b -- c'],
    ['a--b --c', 'a--b --c rdinit=/.tsvisor-agent'],
  ])('%j becomes %j', (append, expected) => expect(appendAgentInit(append)).toBe(expected));

  it('asks the init of the default guest, or the kernel of another', () => {
    const words = (config: object) =>
      commandLine(resolveConfig({ kernel: 'vmlinux', append: 'mine', ...config }), 'hardware');
    expect(words({})).not.toMatch(/agent/);
    expect(words({ agent: true })).toMatch(/ tsvisor\.agent mine$/);
    expect(words({ agent: true, agentProgram: '/x' })).toMatch(/ mine rdinit=\/\.tsvisor-agent$/);
    expect(words({ agent: true, agentProgram: '/x' })).not.toMatch(/tsvisor\.agent/);
  });
});
