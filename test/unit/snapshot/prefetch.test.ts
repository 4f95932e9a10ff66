import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { expect, it } from 'vitest';
import { Prefetch } from '#dist/snapshot/prefetch.js';
import { resources } from '../../support/process-resources.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();
const MiB = 2 ** 20;
const HOLE = 64 * MiB;

/** A file with 8 MiB of data, a hole, and a page of data. */
async function memoryFile(name: string) {
  const file = await open(join(folder, name), 'wx+');
  await file.write(randomBytes(8 * MiB));
  await file.write(randomBytes(4096), 0, 4096, HOLE);
  return { file, size: HOLE + 4096 };
}

/** Bytes that this process has read so far. */
const bytesRead = () => Number(/^rchar: (\d+)$/m.exec(readFileSync('/proc/self/io', 'latin1'))?.[1]);

it('reads what has data, then closes the files', async () => {
  const before = resources().descriptors;
  const { file, size } = await memoryFile('all');
  const prefetch = new Prefetch([file], size);
  const started = bytesRead();
  prefetch.start();
  prefetch.start();
  while (resources().descriptors > before) await delay(5);
  expect(bytesRead() - started).toBeGreaterThanOrEqual(8 * MiB + 4096);
  expect(bytesRead() - started).toBeLessThan(16 * MiB);
  await prefetch.close();
});

it('reads nothing when it is closed before it began, and not on when it is closed', async () => {
  const { file, size } = await memoryFile('none');
  const started = bytesRead();
  await new Prefetch([file], size).close();
  expect(bytesRead() - started).toBeLessThan(MiB);
  const again = await open(join(folder, 'none'));
  const prefetch = new Prefetch([again], size);
  prefetch.start();
  await prefetch.close();
  expect(bytesRead() - started).toBeLessThan(4 * MiB);
  await expect(again.stat()).rejects.toThrow();
});

it('does not mind a file that cannot be read', async () => {
  const { file, size } = await memoryFile('broken');
  await file.close();
  const prefetch = new Prefetch([file], size);
  prefetch.start();
  await prefetch.close();
});
