import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Machine } from '#dist/index.js';
import type { BenchOptions } from './result.js';

/**
 * Calls `use` with a snapshot of the default guest, booted and its agent there, which is gone afterwards; or with the one
 * that the options name.
 */
export async function withBootedGuest<Result>(
  { snapshot, note }: BenchOptions,
  use: (snapshot: string) => Promise<Result>,
): Promise<Result> {
  if (snapshot !== undefined) return await use(snapshot);
  const folder = mkdtempSync(join(tmpdir(), 'tsvisor-bench-'));
  try {
    note('booting a guest (--snapshot spares that)');
    const path = join(folder, 'booted');
    {
      await using machine = await Machine.create();
      await bootToRest(machine);
      await machine.snapshot(path);
    }
    return await use(path);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** Resolves when the default guest has nothing more to do: its init makes links at idle priority after the prompt. */
export async function bootToRest(machine: Machine): Promise<void> {
  await machine.start();
  await machine.ready();
  await machine.exec('while [ -e /etc/applets ]; do sleep 0.2; done'); // the list of them, which is removed at the end
}
