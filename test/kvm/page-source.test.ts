import { execFileSync, spawnSync } from 'node:child_process';
import { copyFileSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { beforeAll, expect, test } from 'vitest';
import { Machine, type PageSourceConfig } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const there = temporaryFolder();
const module = new URL('./modules/pages.js', import.meta.url);
Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const MiB = 2 ** 20;

/**
 * Writes its address into each of 512 pages and 42 at 5 MiB, prints R and waits for a byte. If the pages are right then, it
 * exits with what is at 5 MiB, else with 13.
 */
const GUEST = guestProgram(`
    mov rdi, 0x200000
    mov rcx, 512
  fill:
    mov [rdi], rdi
    add rdi, 4096
    dec rcx
    jnz fill
    mov byte ptr [0x500000], 42
    mov dx, SERIAL + 3
    mov al, 3
    out dx, al
    mov dx, SERIAL
    mov al, 'R'
    out dx, al
    mov dx, SERIAL + 5
  poll:
    in al, dx
    test al, 1
    jz poll
    mov rcx, 512
  check:
    sub rdi, 4096
    cmp [rdi], rdi
    jne wrong
    dec rcx
    jnz check
    mov esi, 0x500000
    mov edx, DEBUG_EXIT
    outsb
  wrong:
    mov al, 13
    out DEBUG_EXIT, al
    hlt`);

describeKvm('memory of a restored machine from a page source', () => {
  const snapshot = join(there, 'snapshot');
  /** Only the state of it. */
  const stateOnly = join(there, 'state-only');
  const file = join(snapshot, 'memory');

  beforeAll(async () => {
    const machine = await Machine.create({ kernel: GUEST, memory: 8 * MiB });
    const said = new Promise((resolve) => machine.serial.once('data', resolve));
    await machine.start();
    await said;
    await machine.snapshot(snapshot);
    await machine.close();
    mkdirSync(stateOnly);
    copyFileSync(join(snapshot, 'state'), join(stateOnly, 'state'));
  });

  const pagesOf = (options: object = {}, rest: Partial<PageSourceConfig> = {}): PageSourceConfig => ({
    module,
    options: { file, ...options },
    ...rest,
  });
  const restore = (pages: PageSourceConfig, prefetch = false) => Machine.restore(stateOnly, { pages, prefetch });
  const go = async (machine: Machine) => {
    await machine.resume();
    machine.serial.write('x');
  };

  test.each([
    ['a class', {}],
    ['a function', { export: 'make' }],
    ['an arrow function', { export: 'arrow' }],
    ['a slow one', { options: { file, ms: 20 } }],
  ] as [string, Partial<PageSourceConfig>][])('is right: %s; the memory file is not needed', async (_, rest) => {
    await using machine = await restore(pagesOf({}, rest));
    await go(machine);
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 42 });
  });

  test('all of it comes before it is touched, with prefetch; then the source is not needed', async () => {
    await using machine = await restore(pagesOf({ fail: 'rejects', after: 8 * 16 }), true);
    await go(machine);
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 42 });
  });

  test('a snapshot of it is whole, though the guest has touched little', async () => {
    const folder = join(there, 'again');
    await using machine = await restore(pagesOf({ ms: 1 }));
    const { memoryBytes } = await machine.snapshot(folder);
    expect(memoryBytes).toBeGreaterThanOrEqual(512 * 4096);
    await using again = await Machine.restore(folder, { verify: true });
    await go(again);
    expect(await again.wait()).toMatchObject({ reason: 'guest-exit', code: 42 });
    await go(machine);
    expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code: 42 });
  });

  test.each([
    ['rejects', 'the disk is gone'],
    ['throws', 'the disk is gone'],
    ['short', 'it gave 100 of 65536 bytes at '],
    ['nothing', 'it gave undefined of 65536 bytes at '],
    ['never', 'it did not give the bytes at '],
    ['spins', 'it did not give the bytes at '],
    ['exits', 'its thread ended'],
    ['uncaught', 'on its own'],
  ])('a source that %s ends the machine', async (fail, why) => {
    for (const after of [3, 20]) {
      await using machine = await restore(pagesOf({ fail, after }, { timeout: 1000 }));
      await go(machine);
      const end = await machine.wait();
      expect(end).toMatchObject({ reason: 'page-source-failure', code: null });
      expect(end.message).toContain(`the page source failed: ${why}`);
      await expect(machine.snapshot(join(there, 'never'))).rejects.toMatchObject({ code: 'ERR_MACHINE_STATE' });
    }
  });

  test('what an instruction does with memory that is lost goes nowhere', async () => {
    await using machine = await restore(pagesOf({ fail: 'rejects', at: 5 * MiB }));
    await go(machine);
    expect(await machine.wait()).toMatchObject({ reason: 'page-source-failure' }); // not its exit code, 0
  });

  test('a snapshot that waits for a source that fails is refused', async () => {
    await using machine = await restore(pagesOf({ fail: 'rejects', after: 5 }));
    await expect(machine.snapshot(join(there, 'never'))).rejects.toThrow(/the page source failed: the disk is gone/);
    expect(await machine.wait()).toMatchObject({ reason: 'page-source-failure' });
  });

  test.each([
    ['NoReader', 'has no read()'],
    ['Throws', 'no such server'],
    ['notOne', 'is neither a class nor a function'],
    ['absent', "'absent' is neither a class nor a function"],
    ['exits', 'its thread ended'],
  ])('export %s is refused before there is a machine', async (name, why) => {
    const before = resources();
    const refused = restore(pagesOf({}, { export: name }));
    await expect(refused).rejects.toMatchObject({ code: 'ERR_SNAPSHOT', message: expect.stringContaining(why) });
    await expectNoMoreThan(before);
  });

  test('a configuration that is wrong names its field', async () => {
    const refuses = (pages: object, what: RegExp) =>
      expect(Machine.restore(stateOnly, { pages: pages as PageSourceConfig })).rejects.toThrow(what);
    await refuses({ module: 'https://example.org/x.js' }, /^pages\.module: .* is neither a path nor a file: URL/);
    await refuses({ module, export: '' }, /^pages\.export: must be a name/);
    await refuses({ module, timeout: 0 }, /^pages\.timeout: 0 is not 1 to 2\^31 - 1 ms/);
    await refuses({ module, options: () => {} }, /^pages\.options: /);
    await refuses({ module, optoins: 1 }, /^pages\.optoins: there is no such field/);
    await refuses({ module: 'no/such/module.js' }, /module\.js: Cannot find module/);
    await expect(Machine.restore(stateOnly, { pages: pagesOf(), verify: true })).rejects.toThrow(/^verify: /);
  });

  const mayNot = process.geteuid?.() === 0 && readFileSync('/proc/sys/vm/unprivileged_userfaultfd', 'latin1') === '0\n';
  test.runIf(mayNot)('a user who may not have page faults is told what to do', () => {
    const source = `
      import { PageSourceThread } from ${JSON.stringify(pathToFileURL('dist/snapshot/page-source.js').href)};
      process.seteuid(65534);
      await PageSourceThread.open({ module: 'x.mjs' }, 4096, false).catch((e) => console.log(e.code, e.message));`;
    const said = execFileSync(process.execPath, ['--input-type=module', '-e', source], { encoding: 'utf8' });
    expect(said).toBe(
      'ERR_SNAPSHOT snapshot: pages: this user may not have page faults of guests; run: sudo sysctl ' +
        'vm.unprivileged_userfaultfd=1, or give the user access to /dev/userfaultfd\n',
    );
  });

  test.each(['never', 'spins'])('stop() and close() do not wait for a source that %s', async (fail) => {
    for (const end of ['stop', 'close'] as const) {
      const machine = await restore(pagesOf({ fail, after: 3 }, { timeout: 2 ** 31 - 1 }));
      await go(machine);
      await delay(100); // the guest waits
      await machine[end]();
      expect(await machine.wait()).toMatchObject({ reason: 'stopped' });
      await machine.close();
    }
  });

  test('nor does the end of the process', () => {
    const pages = pagesOf({ fail: 'never', after: 3 }, { module: module.href });
    const source = `
      import { Machine } from ${JSON.stringify(pathToFileURL('dist/index.js').href)};
      const machine = await Machine.restore(${JSON.stringify(stateOnly)}, { pages: ${JSON.stringify(pages)} });
      await machine.resume();
      machine.serial.write('x');
      setTimeout(() => process.exit(7), 200);`;
    const { status } = spawnSync(process.execPath, ['--input-type=module', '-e', source], { stdio: 'inherit' });
    expect(status).toBe(7);
  });

  test('close() does not wait for a source that does not close', async () => {
    const machine = await restore(pagesOf({}, { export: 'Clings' }));
    await machine.close();
  });

  test('leaves no thread and no descriptor, however it ends', async () => {
    const cycle = async () => {
      for (const fail of [undefined, 'rejects', 'exits', 'never', 'spins']) {
        const machine = await restore(pagesOf({ fail, after: 10 }, { timeout: 300 }));
        await go(machine);
        await machine.wait();
        await machine.close();
      }
      const stuck = await restore(pagesOf({ fail: 'never', after: 3 }));
      await go(stuck);
      await stuck.close();
    };
    await cycle();
    const before = resources();
    await cycle();
    await expectNoMoreThan(before);
  });

  test('the snapshot may go once all is there', async () => {
    const copy = join(there, 'copy');
    copyFileSync(file, copy);
    await using machine = await Machine.restore(stateOnly, { pages: pagesOf({ file: copy }), prefetch: true });
    await machine.snapshot(join(there, 'third')); // all is there
    rmSync(copy);
    await go(machine);
    expect(await machine.wait()).toMatchObject({ code: 42 });
  });
});
