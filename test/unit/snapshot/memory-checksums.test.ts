import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { statSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { checksumsLength, dataChunks, memoryChecksumsOf, verifyMemory } from '#dist/snapshot/memory-checksums.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();
const MiB = 2 ** 20;
const SIZE = 9 * MiB + 8192;

/** A file with data at 3 MiB - 4096 to 3 MiB + 4096, in the last page, and holes elsewhere. */
async function sparse(name: string) {
  const path = join(folder, name);
  const file = await open(path, 'wx+');
  await file.truncate(SIZE);
  await file.write(randomBytes(8192), 0, 8192, 3 * MiB - 4096);
  await file.write(randomBytes(4096), 0, 4096, SIZE - 4096);
  return { path, file };
}

it('finds a changed bit in data, in a hole, and says where', async () => {
  const { path, file } = await sparse('flipped');
  const checksums = await memoryChecksumsOf(file, SIZE);
  expect(checksums.length).toBe(checksumsLength(SIZE));
  await verifyMemory(file, checksums, SIZE, path);
  for (const [at, range] of [
    [3 * MiB - 1, '2097152 to 3145727'],
    [3 * MiB, '3145728 to 4194303'],
    [7 * MiB + 5, '7340032 to 8388607'],
    [SIZE - 1, `${9 * MiB} to ${SIZE - 1}`],
  ] as const) {
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, at);
    await file.write(Buffer.of((byte[0] as number) ^ 0x10), 0, 1, at);
    await expect(verifyMemory(file, checksums, SIZE, path)).rejects.toMatchObject({
      code: 'ERR_SNAPSHOT',
      message: `${path}: damaged: the checksum of bytes ${range} is wrong; take the snapshot again`,
    });
    await file.write(byte, 0, 1, at);
  }
  await verifyMemory(file, checksums, SIZE, path);
  await file.truncate(SIZE - 4096);
  await expect(verifyMemory(file, checksums, SIZE, path)).rejects.toMatchObject({ code: 'ERR_SNAPSHOT' });
  await file.close();
});

it('has the same checksums of a copy whose holes are filled', async () => {
  const { path, file } = await sparse('holes');
  const checksums = await memoryChecksumsOf(file, SIZE);
  await file.close();
  const full = join(folder, 'full');
  execFileSync('cp', ['--sparse=never', path, full]);
  expect(statSync(full).blocks * 512).toBeGreaterThanOrEqual(SIZE);
  const copy = await open(full);
  await verifyMemory(copy, checksums, SIZE, full);
  await copy.close();
});

it('does not read holes', async () => {
  const { file } = await sparse('chunks');
  const read: number[] = [];
  for await (const { at } of dataChunks(file, SIZE)) read.push(at / MiB);
  expect(read).toEqual([2, 3, 9]);
  await file.close();
});
