import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { cli } from '../support/cli.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

/** What `npm pack --json` says. */
interface Packed {
  readonly filename: string;
  readonly size: number;
  readonly files: readonly { readonly path: string; readonly mode: number }[];
}

const folder = temporaryFolder();
const project = join(folder, 'project');
let packed: Packed;

function run(command: string, ...args: string[]) {
  const { status, stdout, stderr } = spawnSync(command, args, { cwd: project, encoding: 'utf8' });
  return { status, stdout, stderr };
}

function write(name: string, text: string): string {
  writeFileSync(join(project, name), text);
  return name;
}

beforeAll(() => {
  const output = execFileSync('npm', ['pack', '--json', '--pack-destination', folder], { encoding: 'utf8' });
  [packed] = JSON.parse(output.slice(output.indexOf('[\n'))) as [Packed];
  mkdirSync(project);
  write('package.json', '{ "private": true, "version": "9.9.9" }');
  const install = run('npm', 'install', '--no-audit', '--no-fund', '--prefer-offline', join(folder, packed.filename));
  if (install.status !== 0) throw new Error(install.stderr);
});

describe('the package', () => {
  test('holds what it needs and no more', () => {
    const paths = packed.files.map(({ path }) => path);
    for (const path of paths) {
      expect(path).toMatch(/^(addon|bin|dist|docs|guest-images)\/|^(LICENSE|README\.md|package\.json)$/);
      expect(path).not.toMatch(/\.map$|\.cache$|\.stamp|^addon\/build|\btest\b/);
    }
    const { exports, bin } = JSON.parse(readFileSync('package.json', 'utf8'));
    const targets = Object.values(exports).flatMap((target) =>
      typeof target === 'string' ? [target] : Object.values(target as object),
    );
    for (const target of [...targets, ...Object.values(bin)] as string[])
      expect(paths).toContain(target.replace('./', ''));
    expect(packed.size).toBeLessThan(2 ** 20);
  });

  test('is imported by a module', () => {
    const file = write(
      'main.mjs',
      `import { Machine, UsageError } from 'tsvisor'; console.log(Machine.name, UsageError.name);`,
    );
    expect(run('node', file)).toEqual({ status: 0, stdout: 'Machine UsageError\n', stderr: '' });
  });

  test('is required by a CommonJS program, without a warning', () => {
    const file = write('main.cjs', `const { Machine } = require('tsvisor'); console.log(Machine.name);`);
    expect(run('node', file)).toEqual({ status: 0, stdout: 'Machine\n', stderr: '' });
  });

  test('has the command, which says what this host offers', () => {
    const { status, stdout } = run('npx', '--no-install', 'tsvisor', 'doctor');
    expect(stdout).toMatch(/\/dev\/kvm/);
    expect([0, 69, 77]).toContain(status);
    if (existsSync('/dev/kvm')) expect(status).toBe(0);
  });

  test('tells its own version, not the project’s', () => {
    const { version } = JSON.parse(readFileSync('package.json', 'utf8'));
    expect(run('npx', '--no-install', 'tsvisor', '--version').stdout).toBe(`${version}\n`);
  });

  test('builds the same guests', async () => {
    const { stdout, stderr } = run('npx', '--no-install', 'tsvisor', 'kernel', 'path');
    expect(stderr).toBe('');
    expect(stdout).toBe((await cli(['kernel', 'path'])).stdout);
    expect(run('npx', '--no-install', 'tsvisor', 'initramfs', 'path').stdout).toMatch(/initramfs/);
  });

  test.each(['nodenext', 'bundler'])('has types for moduleResolution %s', (moduleResolution) => {
    mkdirSync(join(project, 'node_modules/@types'), { recursive: true });
    for (const name of ['@types/node', 'undici-types', 'vitest', '@vitest']) {
      const link = join(project, 'node_modules', name);
      if (!existsSync(link)) symlinkSync(resolve('node_modules', name), link);
    }
    const text = `import { Machine, type MachineConfig } from 'tsvisor';
      const config: MachineConfig = { memory: 2 ** 26 };
      export const machine: Promise<Machine> = Machine.create(config);
      // @ts-expect-error memory is a number
      export const wrong: MachineConfig = { memory: '64M' };`;
    const files = [write('module.mts', text)];
    if (moduleResolution === 'nodenext') files.push(write('commonjs.cts', text));
    const module = moduleResolution === 'nodenext' ? 'nodenext' : 'esnext';
    const options = ['--noEmit', '--strict', '--target', 'es2022', '--types', 'node', '--module', module];
    const tsc = [resolve('node_modules/.bin/tsc'), ...options, '--moduleResolution', moduleResolution] as const;
    expect(run(...tsc, ...files)).toEqual({ status: 0, stdout: '', stderr: '' });
    const kit = `import { machineTest } from 'tsvisor/vitest';
      machineTest({ memory: 2 ** 26 })('a test', async ({ machine, expect }) => {
        expect(machine.state.length).toBe(7);
        // @ts-expect-error there is no such thing
        machine.nothing();
      });`;
    expect(run(...tsc, '--skipLibCheck', write('kit.mts', kit))).toEqual({ status: 0, stdout: '', stderr: '' });
  });

  test('says what to install where its addon cannot be compiled', () => {
    const { status, stderr } = spawnSync(process.execPath, ['addon/compile.mjs'], {
      env: { PATH: '' },
      encoding: 'utf8',
    });
    expect(stderr).toMatch(
      /^tsvisor: [^\n]* lacks g\+\+, make, python3; [^\n]*apt-get install g\+\+ make python3[^\n]*\n$/,
    );
    expect(status).toBe(1);
  });
});

describeKvm('the package', () => {
  test('runs a guest', () => {
    const kernel = guestProgram('mov al, 7\nout DEBUG_EXIT, al');
    const file = write(
      'guest.mjs',
      `import { Machine } from 'tsvisor';
       const machine = await Machine.create({ kernel: ${JSON.stringify(kernel)} });
       await machine.start();
       const { reason, code } = await machine.wait();
       await machine.close();
       console.log(reason, code);`,
    );
    expect(run('node', file)).toEqual({ status: 0, stdout: 'guest-exit 7\n', stderr: '' });
  });
});
