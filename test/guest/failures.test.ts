import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, test } from 'vitest';
import { Machine, TsvisorError } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const BOOT = 600_000;
const OPERATION = 300_000;
const folder = temporaryFolder();

/** Lets a machine run, does what goes wrong, and returns the error of that with the machine's end. */
async function fail(made: Promise<Machine>, act: (machine: Machine) => Promise<unknown>) {
  await using machine = await made;
  await (machine.state === 'paused' ? machine.resume() : machine.start());
  const error = await act(machine).then(
    () => new Error('nothing went wrong'),
    (error: unknown) => error,
  );
  expect(error).toBeInstanceOf(TsvisorError);
  const { code, console } = error as TsvisorError;
  const running = machine.state !== 'ended';
  const end = running
    ? 'running'
    : await machine.wait().then(
        ({ reason }) => reason,
        ({ code }) => code,
      );
  return { code, console, end };
}

/** Says something on the console first, so that there is a last line to be told. */
const say = (machine: Machine, text: string) => machine.exec(`echo ${text} > /dev/console`);

/** All of them leave the process as it was. */
describeKvm('a machine with which something is wrong', () => {
  const disk = join(folder, 'disk.img');
  const ready = join(folder, 'ready');
  let before: ReturnType<typeof resources> | undefined;
  const leavesNothing = async () => {
    before ??= resources(); // what is loaded at the first time stays
    await expectNoMoreThan(before);
  };
  const restored = () => Machine.restore(ready);

  beforeAll(async () => {
    writeFileSync(disk, new Uint8Array(1 << 20));
    await using machine = await Machine.create({ drives: [{ file: disk, onError: 'end' }] });
    await machine.start();
    await machine.ready({ timeout: BOOT });
    await machine.snapshot(ready, { stop: true, disks: 'reference' });
  }, BOOT);

  test('its init exits before there is an agent', { timeout: BOOT }, async () => {
    const machine = Machine.create({ append: 'rdinit=/bin/busybox' });
    const failed = await fail(machine, (machine) => machine.ready({ timeout: BOOT - 60_000 }));
    await leavesNothing();
    // busybox that is run as `busybox` exits, and init must not.
    expect(failed).toMatchObject({ code: 'ERR_GUEST_PANIC', end: 'guest-panic' });
    expect(failed.console).toContain('Attempted to kill init');
  });

  test('its agent stops answering', { timeout: OPERATION }, async () => {
    const failed = await fail(restored(), async (machine) => {
      await say(machine, 'sleepy');
      // The one that listens, not the process of this command: it is to be done.
      await machine.exec('kill -STOP $(cut -d " " -f 4 /proc/$PPID/stat)');
      await machine.exec('true');
    });
    await leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_AGENT_TIMEOUT', end: 'running' });
    expect(failed.console).toContain('sleepy');
  });

  test('its kernel panics', { timeout: OPERATION }, async () => {
    const failed = await fail(restored(), (machine) => machine.exec('echo c > /proc/sysrq-trigger'));
    await leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_GUEST_PANIC', end: 'guest-panic' });
    expect(failed.console).toContain('Kernel panic - not syncing: sysrq triggered crash');
  });

  test('it powers off under a command', { timeout: OPERATION }, async () => {
    const failed = await fail(restored(), (machine) => machine.exec('poweroff; sleep 60'));
    await leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_MACHINE_ENDED', end: 'guest-shutdown' });
  });

  test('its thread dies', { timeout: BOOT }, async () => {
    const devices = [{ module: new URL('../kvm/modules/dies.js', import.meta.url), name: 'dies' }];
    const failed = await fail(Machine.create({ devices }), async (machine) => {
      await say(machine, 'goodbye');
      await machine.exec(`devmem ${machine.device('dies').address} 32 1`);
    });
    await leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_MACHINE_CRASHED', end: 'ERR_MACHINE_CRASHED' });
    expect(failed.console).toContain('goodbye');
  });

  test('it ends in the middle of something', { timeout: OPERATION }, async () => {
    const failed = await fail(restored(), async (machine) => {
      await say(machine, 'enough');
      await machine.exec('kill -USR2 1; sleep 1000');
    });
    await leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_MACHINE_ENDED', end: 'guest-shutdown' });
    expect(failed.console).toContain('enough');
  });

  // The last one: the snapshot refers to that disk.
  test('its disk vanishes', { timeout: OPERATION }, async () => {
    const failed = await fail(restored(), async (machine) => {
      await say(machine, 'reading');
      truncateSync(disk, 0);
      await machine.exec('cat /dev/vda');
    });
    await leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_DRIVE', end: 'drive-failure' });
    expect(failed.console).toContain('reading');
  });
});
