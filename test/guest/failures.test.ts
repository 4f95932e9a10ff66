import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Machine, type MachineConfig, TsvisorError } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { resources } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const BOOT = 300_000;
const folder = temporaryFolder();

/** Boots, does what goes wrong, and returns the error of that with the machine's end. */
async function fail(config: MachineConfig, act: (machine: Machine) => Promise<unknown>) {
  await using machine = await Machine.create(config);
  await machine.start();
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
  let before: ReturnType<typeof resources> | undefined;
  const leavesNothing = () => {
    const now = resources();
    before ??= now; // what is loaded at the first time stays
    expect(now.descriptors).toBe(before.descriptors);
    expect(now.threads).toBe(before.threads);
  };

  test('its init exits before there is an agent', { timeout: BOOT }, async () => {
    const failed = await fail({ append: 'rdinit=/bin/busybox' }, (machine) =>
      machine.ready({ timeout: BOOT - 60_000 }),
    );
    leavesNothing();
    // busybox that is run as `busybox` exits, and init must not.
    expect(failed).toMatchObject({ code: 'ERR_GUEST_PANIC', end: 'guest-panic' });
    expect(failed.console).toContain('Attempted to kill init');
  });

  test('its agent stops answering', { timeout: BOOT }, async () => {
    const failed = await fail({}, async (machine) => {
      await say(machine, 'sleepy');
      // The one that listens, not the process of this command: it is to be done.
      await machine.exec('kill -STOP $(cut -d " " -f 4 /proc/$PPID/stat)');
      await machine.exec('true');
    });
    leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_AGENT_TIMEOUT', end: 'running' });
    expect(failed.console).toContain('sleepy');
  });

  test('its kernel panics', { timeout: BOOT }, async () => {
    const failed = await fail({}, (machine) => machine.exec('echo c > /proc/sysrq-trigger'));
    leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_GUEST_PANIC', end: 'guest-panic' });
    expect(failed.console).toContain('Kernel panic - not syncing: sysrq triggered crash');
  });

  test('it powers off under a command', { timeout: BOOT }, async () => {
    const failed = await fail({}, (machine) => machine.exec('poweroff; sleep 60'));
    leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_MACHINE_ENDED', end: 'guest-shutdown' });
  });

  test('its thread dies', { timeout: BOOT }, async () => {
    const devices = [{ module: new URL('../kvm/modules/dies.js', import.meta.url), name: 'dies' }];
    const failed = await fail({ devices }, async (machine) => {
      await say(machine, 'goodbye');
      await machine.exec(`devmem ${machine.device('dies').address} 32 1`);
    });
    leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_MACHINE_CRASHED', end: 'ERR_MACHINE_CRASHED' });
    expect(failed.console).toContain('goodbye');
  });

  test('its disk vanishes', { timeout: BOOT }, async () => {
    const file = join(folder, 'disk.img');
    writeFileSync(file, new Uint8Array(1 << 20));
    const failed = await fail({ drives: [{ file, onError: 'end' }] }, async (machine) => {
      await say(machine, 'reading');
      truncateSync(file, 0);
      await machine.exec('cat /dev/vda');
    });
    leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_DRIVE', end: 'drive-failure' });
    expect(failed.console).toContain('reading');
  });

  test('it ends in the middle of something', { timeout: BOOT }, async () => {
    const failed = await fail({}, async (machine) => {
      await say(machine, 'enough');
      await machine.exec('kill -USR2 1; sleep 1000');
    });
    leavesNothing();
    expect(failed).toMatchObject({ code: 'ERR_MACHINE_ENDED', end: 'guest-shutdown' });
    expect(failed.console).toContain('enough');
  });
});
