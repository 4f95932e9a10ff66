import { on, once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { Machine, type MachineConfig, MachineError, type MachineState } from '#dist/index.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const MiB = 2 ** 20;

/** Prints a text on ttyS0; clobbers registers. */
const print = (text: string) => `
  lea rsi, [rip + 9f]
  mov ecx, ${Buffer.byteLength(text)}
1:
  mov dx, SERIAL + 5
2:
  in al, dx
  test al, 0x20
  jz 2b
  mov dx, SERIAL
  lodsb
  out dx, al
  loop 1b
  jmp 8f
9: .byte ${[...Buffer.from(text)].join()}
8:`;

const RESET = 'mov al, 0xfe; out I8042, al';
const SPIN = 'spin: jmp spin';
/** Where the first MMIO device of a program is. */
const DEVICE = '0xd1000000';

const create = (assembly: string, config: Partial<MachineConfig> = {}, options = {}) =>
  Machine.create({ kernel: guestProgram(assembly), memory: 4 * MiB, ...config }, options);

describeKvm('a guest whose kernel panics', () => {
  const PANIC = '[    1.234567] Kernel panic - not syncing: no \x1b[1mreason\n';

  test('ends the machine, which says why, also where a reset would boot it again', async () => {
    await using machine = await create(`${print(`hello\n${PANIC}trace\n`)} ${RESET}`);
    await machine.start();
    expect(await machine.wait()).toEqual({
      reason: 'guest-panic',
      code: null,
      message: 'the guest’s kernel panicked: no reason',
    });
    expect(machine.consoleTail(3).split('\n')).toEqual(['hello', PANIC.replace('\x1b[1m', '').trim(), 'trace']);
    expect(machine.state).toBe('ended');
  });

  test('is told from one that only mentions it', async () => {
    const text = 'grep: Kernel panic - not syncing: no\n';
    await using machine = await create(`${print(text)} ${RESET}`, { onReset: 'end' });
    await machine.start();
    expect(await machine.wait()).toMatchObject({ reason: 'guest-reset' });
  });
});

describeKvm('a machine', () => {
  test('tells its state, at once and by events', async () => {
    await using machine = await create(SPIN);
    const states: MachineState[] = [];
    machine.on('state', (state) => states.push(state));
    expect(machine.state).toBe('created');
    const ended = once(machine, 'end');
    await machine.start();
    expect(machine.state).toBe('running');
    await machine.pause();
    expect(machine.state).toBe('paused');
    await machine.resume();
    await machine.stop();
    expect(states).toEqual(['running', 'paused', 'running', 'ended']);
    expect(await ended).toEqual([{ reason: 'stopped', code: null, message: 'the machine was stopped' }]);
  });

  test('tells of each reset of its guest', async () => {
    await using machine = await create(RESET);
    const resets = on(machine, 'reset', { signal: AbortSignal.timeout(30_000) });
    await machine.start();
    for (let i = 0; i < 3; i++) await resets.next();
    await machine.stop();
  });

  test('counts what it does', async () => {
    await using machine = await create('again: in al, 0x80; jmp again');
    expect((await machine.metrics()).phases.firstEntry).toBeUndefined();
    await machine.start();
    await delay(20);
    const { state, exits, phases } = await machine.metrics();
    expect(state).toBe('running');
    expect(exits.io).toBeGreaterThan(10);
    expect(phases.firstEntry).toBeGreaterThan(phases.kernelLoaded as number);
    await machine.stop();
    expect((await machine.metrics()).state).toBe('ended');
  });

  test('that is closed while it runs has been stopped, and says so', async () => {
    const machine = await create(SPIN);
    await machine.start();
    const ended = once(machine, 'end');
    const stopped = { reason: 'stopped', code: null, message: 'the machine was stopped' };
    await Promise.all([machine.close(), machine.close()]);
    expect(await machine.wait()).toEqual(stopped);
    expect(await ended).toEqual([stopped]);
    expect(await machine.metrics()).toMatchObject({ state: 'ended' });
  });

  test('that ends while it is asked what it does tells that', async () => {
    await using machine = await create('mov dx, 0xf4; mov al, 7; out dx, al; spin: jmp spin');
    await machine.start();
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300); // it ends, and this thread has not heard of it
    expect(machine.state).toBe('running');
    expect(await machine.metrics()).toMatchObject({ state: 'ended' });
  });

  test('ends as it does although a listener throws, whose error is not lost', async () => {
    await using machine = await create(SPIN);
    const thrown: Error[] = [];
    const catching = process.listeners('uncaughtException');
    process.removeAllListeners('uncaughtException').on('uncaughtException', (error) => thrown.push(error));
    machine.on('state', () => {
      if (machine.state === 'ended') throw new Error('state');
    });
    machine.on('end', () => {
      throw new Error('end');
    });
    await machine.start();
    expect(await machine.stop()).toMatchObject({ reason: 'stopped' });
    await delay(10);
    process.removeAllListeners('uncaughtException');
    for (const listener of catching) process.on('uncaughtException', listener);
    expect(thrown.map(({ message }) => message)).toEqual(['state', 'end']);
  });

  test('is one of many without a warning of Node’s', async () => {
    const warnings: Error[] = [];
    const onWarning = (warning: Error) => warnings.push(warning);
    process.on('warning', onWarning);
    const machines = await Promise.all(Array.from({ length: 12 }, () => create(SPIN)));
    expect(process.listenerCount('exit')).toBeLessThan(10);
    await Promise.all(machines.map((machine) => machine.close()));
    process.off('warning', onWarning);
    expect(warnings).toEqual([]);
  });

  test('that nobody watches prints as much as it likes; who asks later gets what was printed last', async () => {
    const rounds = 150;
    const line = `${'-'.repeat(998)}.\n`;
    await using machine = await create(`
      mov ebx, ${rounds}
    more:
      ${print(line)}
      dec ebx
      jnz more
      ${print('the end\n')}
      ${SPIN}`);
    await machine.start();
    while (!machine.consoleTail(1).endsWith('the end')) await delay(20);
    let text = '';
    machine.serial.setEncoding('latin1').on('data', (chunk: string) => {
      text += chunk;
    });
    while (!text.endsWith('the end\n')) await delay(20);
    expect(text.length).toBeLessThan(rounds * line.length);
  });
});

describeKvm('a machine on a thread that was kept warm', () => {
  test('runs, with as much memory as was expected and with another size', async () => {
    Machine.keepWarm(1);
    try {
      // The guest tells whether the last byte of 6 MiB is RAM.
      const guest = 'mov ebx, 0x5fffff; mov byte ptr [rbx], 5; mov al, [rbx]; out DEBUG_EXIT, al';
      for (const [megabytes, code] of [
        [6, 5],
        [6, 5],
        [4, 255],
        [8, 5],
      ] as const) {
        await delay(300); // most likely it is ready then; it is right all the same where it is not
        await using machine = await create(guest, { memory: megabytes * MiB });
        await machine.start();
        expect(await machine.wait()).toMatchObject({ reason: 'guest-exit', code });
      }
    } finally {
      Machine.keepWarm(0);
    }
  });
});

describeKvm('a machine whose thread dies', () => {
  const die = async () => {
    const create = Machine.create({
      kernel: guestProgram(
        `${print('about to\n')} mov eax, DEVICE; mov dword ptr [rax], 1; ${SPIN}`.replace('DEVICE', DEVICE),
      ),
      memory: 4 * MiB,
      devices: [{ module: new URL('./modules/dies.js', import.meta.url), name: 'dies' }],
    });
    await using machine = await create;
    expect(machine.device('dies').address).toBe(Number(DEVICE));
    await machine.start();
    const error = await machine.wait().catch((error) => error);
    expect(error).toBeInstanceOf(MachineError);
    expect(error).toMatchObject({
      code: 'ERR_MACHINE_CRASHED',
      message: 'the machine thread died: it exited with code 3',
      console: 'about to',
    });
    expect(machine.state).toBe('ended');
    await expect(machine.metrics()).rejects.toBe(error);
  };

  test('says so to everybody, leaves nothing behind and the process as it was', async () => {
    await die();
    const before = resources();
    await Promise.all([die(), die(), die()]);
    await expectNoMoreThan(before);
  });
});

describeKvm('an AbortSignal', () => {
  test('that is aborted already makes no machine', async () => {
    const reason = new Error('not today');
    await expect(create(SPIN, {}, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });

  test('keeps a machine from being made, and leaves nothing behind', async () => {
    await (await create(SPIN)).close();
    const before = resources();
    const reason = new Error('changed my mind');
    const controller = new AbortController();
    const made = create(SPIN, {}, { signal: controller.signal });
    setTimeout(() => controller.abort(reason), 5);
    await expect(made).rejects.toBe(reason);
    await expectNoMoreThan(before);
  });

  test('keeps a machine from being made that is made, which this thread has not heard yet', async () => {
    const reason = new Error('too late');
    const controller = new AbortController();
    const made = create(SPIN, {}, { signal: controller.signal });
    made.catch(() => {});
    await delay(20);
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
    controller.abort(reason);
    await expect(made).rejects.toBe(reason);
  });

  test('keeps a machine from being made whose device does not load', async () => {
    const reason = new Error('it takes too long');
    const devices = [{ module: new URL('./modules/never-loads.js', import.meta.url), name: 'never' }];
    const controller = new AbortController();
    const made = create(SPIN, { devices }, { signal: controller.signal });
    setTimeout(() => controller.abort(reason), 200);
    await expect(made).rejects.toBe(reason);
  });

  test('ends a machine that runs', async () => {
    const controller = new AbortController();
    await using machine = await create(SPIN, {}, { signal: controller.signal });
    await machine.start();
    controller.abort();
    expect(await machine.wait()).toMatchObject({ reason: 'stopped' });
  });
});
