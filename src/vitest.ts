/**
 * Tests with vitest, each with a virtual machine of its own.
 *
 * @module tsvisor/vitest
 */

import { type TestAPI, test, vi } from 'vitest';
import type { MachineConfig } from './machine/config.js';
import type { Machine } from './machine/machine.js';
import { MachinePool } from './machine/machine-pool.js';

/** More than ready() waits, whose error tells more: where KVM interprets guests, a boot may take a minute. */
const DEFAULT_TIMEOUT = 180_000;
/** How many lines of the guest's console a failed test shows. */
const SHOWN_LINES = 200;

/** What a test gets besides vitest's own context. */
export interface MachineFixtures {
  /** A machine that nothing else has used, running and ready; closed after the test. */
  readonly machine: Machine;
}

/** How machineTest() makes its machines. */
export interface MachineTestOptions {
  /**
   * Waits until the guest can be tested, and may prepare it: every test finds it as this left it. Called once for a file (for
   * each test where the configuration has `devices`). Default: until its agent answers.
   */
  readonly ready?: (machine: Machine) => Promise<void>;
  /** Time limit in milliseconds, boot included, of the file's tests that name none; default three minutes. */
  readonly timeout?: number;
}

/**
 * vitest's `test`, with a fixture `machine`: each test that names it gets a fresh one. Only the first of a file boots; each
 * test's goes on from a snapshot of it, taken when it was ready. A test that fails shows what its guest printed on the console; where there is no usable KVM, tests
 * are skipped, with the reason.
 *
 * ```ts
 * import { machineTest } from 'tsvisor/vitest';
 *
 * const test = machineTest({ memory: 64 * 2 ** 20 });
 *
 * test('uname', async ({ machine, expect }) => {
 *   const { stdout } = await machine.exec('uname -s');
 *   expect(stdout).toBe('Linux\n');
 * });
 * ```
 *
 * @param config as Machine.create() takes it; without `kernel`, the default guest.
 */
export function machineTest(config: MachineConfig = {}, options: MachineTestOptions = {}): TestAPI<MachineFixtures> {
  const { ready = agentReady, timeout = DEFAULT_TIMEOUT } = options;
  vi.setConfig({ testTimeout: timeout });
  const extended = test.extend<MachineFixtures & { machines: MachinePool }>({
    machines: [
      // biome-ignore lint/correctness/noEmptyPattern: vitest reads the parameter's pattern
      async ({}, use) => {
        const pool = new MachinePool(config, ready);
        // The default reporter keeps the reason of a single test to itself.
        // biome-ignore lint/suspicious/noConsole: vitest shows it with the file's name
        if (pool.unavailable !== undefined) console.warn(`Tests with a machine are skipped: ${pool.unavailable}`);
        await use(pool);
        await pool.close();
      },
      { scope: 'file' },
    ],
    machine: async ({ machines, skip, onTestFailed }, use) => {
      const reason = machines.unavailable;
      if (reason !== undefined) skip(reason);
      const guest = await machines.take();
      onTestFailed(() => showConsole(guest.machine));
      await guest.ready;
      await use(guest.machine);
      await guest.machine.close();
    },
  });
  return extended as unknown as TestAPI<MachineFixtures>; // the pool is ours
}

async function agentReady(machine: Machine): Promise<void> {
  await machine.ready();
}

function showConsole(machine: Machine): void {
  const text = machine.consoleTail(SHOWN_LINES);
  // biome-ignore lint/suspicious/noConsole: vitest shows it beside the test's name
  console.error(text === '' ? 'The guest printed nothing on its console.' : `The guest's console:\n${text}`);
}
