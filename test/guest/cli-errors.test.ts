import { execFileSync, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  chmodSync,
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { buildBzImage, buildElf, pattern } from '../support/boot-images.js';
import { type CliResult, cli, cliPath, finish } from '../support/cli.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';

const exits7 = () => guestProgram('mov al, 7; out DEBUG_EXIT, al');
let folder: string;

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'tsvisor-test-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** One line on stderr that starts with the program's name, nothing on stdout, this exit code. */
function expectOneLine(result: CliResult, code: number, message: RegExp): void {
  expect(result.stderr).toMatch(message);
  expect(result.stderr).toMatch(/^tsvisor: [^\n]+\n$/);
  expect(result.stdout).toBe('');
  expect(result.code).toBe(code);
}

function file(name: string, content: string | Uint8Array): string {
  const path = join(folder, name);
  writeFileSync(path, content);
  return path;
}

test('a stdout that takes nothing is told of, one that was closed is not', async () => {
  const full = openSync('/dev/full', 'w');
  const child = spawn(process.execPath, [cliPath, 'completion', 'bash'], { stdio: ['ignore', full, 'pipe'] });
  closeSync(full);
  const [stderr, [code]] = await Promise.all([text(child.stderr as NodeJS.ReadableStream), once(child, 'close')]);
  expect([code, stderr]).toEqual([73, 'tsvisor: cannot write to stdout: ENOSPC: no space left on device, write\n']);
  const closed = spawn(process.execPath, [cliPath, 'completion', 'bash'], { stdio: 'pipe' });
  closed.stdout.destroy();
  expect(await finish(closed)).toMatchObject({ code: 141, stderr: '' });
});

describe('usage errors exit 64 with one line', () => {
  const cases: [string, string[], RegExp][] = [
    ['no command', [], /command is needed/],
    ['an unknown command', ['rnu'], /there is no command 'rnu'\. Did you mean run\?/],
    ['an unknown option', ['run', '--kernle', 'x'], /kernle/],
    ['an option without its value', ['run', '--kernel'], /kernel/],
    ['a size that is none', ['run', '--memory', 'lots'], /--memory: 'lots' is not a size/],
    [
      'a number of vCPUs that cannot be',
      ['run', '--kernel', 'x', '--cpus', '0'],
      /cpus: 0 is not a number of vCPUs from 1 to 254/,
    ],
    ['a serial that is none', ['run', '--serial', 'tcp:1'], /--serial: 'tcp:1'/],
    ['a timeout that is none', ['run', '--timeout', 'soon'], /--timeout/],
    ['a negative timeout', ['run', '--timeout=-1'], /--timeout: -1/],
    ['the last of two numbers', ['run', '--kernel', 'x', '--cpus', '1', '--cpus', '255'], /cpus: 255 /],
    ['a negated value', ['run', '--no-memory'], /no-memory/],
    ['an unknown action', ['kernel', 'burn'], /burn|build/],
  ];
  test.each(cases)('%s', async (_name, args, message) => {
    expectOneLine(await cli(args), 64, message);
  });
});

test('--help breaks no line inside a word', async () => {
  const { stdout } = await cli(['run', '--help']);
  for (const sentence of [
    '/dev/console if stdio, or if ttyS0 is none',
    'no KVM, 71 memory',
    '80 guest reset, 81 triple',
  ]) {
    expect(stdout.replace(/\s+/g, ' ')).toContain(sentence);
  }
});

test('--help and --version teach and exit 0', async () => {
  for (const args of [['--help'], ['run', '--help'], ['kernel', '--help'], ['doctor', '--help']]) {
    const { code, stdout } = await cli(args);
    expect(code).toBe(0);
    expect(stdout).toMatch(/tsvisor/);
  }
  expect((await cli(['run', '--help'])).stdout).toMatch(/Exit codes:.*Ctrl-A|Ctrl-A x.*Exit codes:/s);
  expect((await cli(['--version'])).stdout.trim()).toBe(JSON.parse(readFileSync('package.json', 'utf8')).version);
});

describeKvm('kernels and initrds that cannot be booted', () => {
  const elf = () => readFileSync(exits7());
  const patched = (offset: number, value: number) => {
    const bytes = elf();
    bytes[offset] = value;
    return bytes;
  };
  const kernels: [string, () => string, RegExp][] = [
    ['missing', () => join(folder, 'missing'), /missing: .*(no such|does not exist|not found)/i],
    ['a directory', () => folder, /director/],
    ['empty', () => file('empty', ''), /empty/],
    ['random bytes', () => file('random', randomBytes(70_000)), /neither an ELF nor a bzImage/],
    ['a truncated ELF', () => file('truncated', elf().subarray(0, 70)), /truncated|past|short/],
    ['a 32-bit ELF', () => file('elf32', buildElf({ bits: 32 })), /32-bit/],
    ['an ELF of another machine', () => file('aarch64', patched(18, 183)), /AArch64/i],
    ['a big-endian ELF', () => file('big', patched(5, 2)), /big-endian/],
  ];
  test.each(kernels)('kernel: %s', async (_name, path, message) => {
    expectOneLine(await cli(['run', '--kernel', path()]), 66, message);
  });

  test('a truncated bzImage', async () => {
    const image = await buildBzImage({ payload: pattern(100_000) });
    const path = file('bzImage', image.subarray(0, image.length - 50_000));
    expectOneLine(await cli(['run', '--kernel', path]), 66, /truncated|ends|short/);
  });

  test('initrd: missing, and larger than memory', async () => {
    const kernel = exits7();
    expectOneLine(await cli(['run', '--kernel', kernel, '--initrd', join(folder, 'none')]), 66, /initrd .*none/);
    const large = file('large', '');
    truncateSync(large, 2 ** 27);
    expectOneLine(await cli(['run', '--kernel', kernel, '--initrd', large]), 71, /initrd .*large/);
  });

  test('the default kernel does not fit 8 MiB', async () => {
    const kernel = execFileSync(process.execPath, [cliPath, 'kernel', 'path'], { encoding: 'utf8' }).trim();
    expectOneLine(await cli(['run', '--kernel', kernel, '--memory', '8M']), 71, /memory/);
  });

  test('memory that no host has', async () => {
    expectOneLine(await cli(['run', '--kernel', exits7(), '--memory', '900000G']), 71, /memory/);
  });

  test('a command line over the limit', async () => {
    const result = await cli(['run', '--kernel', exits7(), '--append', 'x'.repeat(5000)]);
    expectOneLine(result, 64, /command line.*5\d\d\d.*2047|command line.*2047/);
  });
});

describeKvm('files that cannot be written', () => {
  test('--stats and --serial file:', async () => {
    const kernel = exits7();
    const nowhere = join(folder, 'no', 'such', 'folder', 'out');
    expectOneLine(await cli(['run', '--kernel', kernel, '--stats', nowhere]), 73, /--stats: cannot write .*no folder/);
    expectOneLine(await cli(['run', '--kernel', kernel, '--stats', folder]), 73, /--stats: .*directory/);
    expectOneLine(await cli(['run', '--kernel', kernel, '--serial', `file:${nowhere}`]), 73, /--serial/);
    expectOneLine(await cli(['run', '--kernel', kernel, '--stats', '/dev/full']), 73, /disk is full|\/dev\/full/);
  });

  test('--stats appears complete or not at all', async () => {
    const path = join(folder, 'stats.json');
    expect((await cli(['run', '--kernel', exits7(), '--stats', path])).code).toBe(7);
    const stats = JSON.parse(readFileSync(path, 'utf8'));
    expect(stats.end).toMatchObject({ reason: 'guest-exit', code: 7 });
    const { vmCreated, kernelLoaded, firstEntry } = stats.phases;
    expect(vmCreated).toBeGreaterThan(0);
    expect(kernelLoaded).toBeGreaterThan(vmCreated);
    expect(firstEntry).toBeGreaterThan(kernelLoaded);
    expect(stats.peakRssBytes).toBeGreaterThan(2 ** 20);
    expect((await cli(['run', '--kernel', '/nonexistent', '--stats', path])).code).toBe(66);
    expect(JSON.parse(readFileSync(path, 'utf8'))).toEqual(stats);
    expect(readdirSync(folder).filter((name) => name.includes('.tmp'))).toEqual([]);
  });
});

/** Runs the command line after a shell command, in a mount namespace of its own: as in a container. */
function inNamespace(setup: string, kernel: string, prefix = ''): Promise<CliResult> {
  const script = `${setup} && exec ${prefix} "${process.execPath}" "${cliPath}" run --kernel "${kernel}"`;
  const child = spawn('unshare', ['--mount', 'sh', '-c', script], { stdio: 'pipe' });
  child.stdin.end();
  return finish(child);
}

describeKvm('without a usable /dev/kvm', () => {
  test('missing: exit 69 and a remedy', async () => {
    const empty = join(folder, 'dev');
    mkdirSync(empty);
    const result = await inNamespace(`mount --bind "${empty}" /dev`, exits7());
    expectOneLine(result, 69, /\/dev\/kvm does not exist.*modprobe/);
  });

  test('not a KVM device: exit 69', async () => {
    expectOneLine(await inNamespace('mount --bind /dev/null /dev/kvm', exits7()), 69, /not a KVM device/);
  });

  test('not permitted: exit 77 and a remedy', async () => {
    // Root is refused nothing: this runs as another user, who needs a kernel and a program that it may read.
    const forbidden = file('forbidden', '');
    chmodSync(forbidden, 0);
    const kernel = file('kernel', readFileSync(exits7()));
    chmodSync(folder, 0o755);
    const asNobody = 'setpriv --reuid 65534 --clear-groups --inh-caps=-all';
    const result = await inNamespace(`mount --bind "${forbidden}" /dev/kvm`, kernel, asNobody);
    expectOneLine(result, 77, /\/dev\/kvm: permission denied.*usermod -aG kvm/);
  });
});

describe('doctor', () => {
  test('says whether machines can run, as text and as JSON', async () => {
    const { code, stdout } = await cli(['doctor', '--json']);
    const report = JSON.parse(stdout);
    expect(report.canRun).toBe(code === 0);
    const checks = report.findings.map((f: { check: string }) => f.check);
    expect(checks).toEqual(expect.arrayContaining(['host', '/dev/kvm', 'tun', 'memory', 'guest build']));
    for (const { status } of report.findings) expect(['ok', 'warn', 'lack']).toContain(status);
    expect((await cli(['doctor'])).stdout).toMatch(/\/dev\/kvm/);
  });
});
