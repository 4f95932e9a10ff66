import { statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname } from 'node:path';
import { MigrationError } from '../errors.js';
import type { DriveOverride } from '../snapshot/disks.js';
import { isUnchanged } from '../snapshot/file-reference.js';
import type { DiskCapture, FileReference } from '../snapshot/format.js';
import { violation } from './channel.js';

/** As mkdtemp makes them for a restored machine. */
const OWN_FOLDER = /^tsvisor-(fork-)?[A-Za-z0-9]{6}$/;

type Overrides = readonly (DriveOverride | undefined)[];

/**
 * Where a target finds the drives of a machine that still runs at the source: the files that the source has, unless
 * others are given. @throws MigrationError that names the drive whose files are not here
 */
export function drivesHere(disks: readonly DiskCapture[], overrides: Overrides): DriveOverride[] {
  return disks.map(({ kind, files }, index) => {
    if (kind !== 'reference') throw violation(`a drive of kind ${kind}`);
    const here = (file: FileReference) => (isSameFile(file) ? file.path : notHere(index, file));
    const { file = image(files, here), overlay = files[1] && here(files[1]) } = overrides[index] ?? {};
    return { file, ...(overlay !== undefined && { overlay }) };
  });
}

/** Whether those files still are what they were when the guest stopped. @throws MigrationError that names the drive */
export function checkDrives(
  described: readonly DiskCapture[],
  disks: readonly DiskCapture[],
  overrides: Overrides,
): void {
  if (disks.length !== described.length) throw violation('other drives than it described');
  for (const [index, { files }] of disks.entries()) {
    const before = described[index]?.files ?? [];
    const override = overrides[index];
    for (const [at, file] of before.entries()) {
      if (at === 0 ? override?.file : override?.overlay) continue;
      const now = files[at];
      if (now?.path !== file.path) throw violation('other drives than it described');
      if (!isUnchanged(now)) notHere(index, now);
    }
  }
}

/** Folders with files of the machine's own (see RestoreOptions), which go with it from process to process. */
export function ownFolders(disks: readonly DiskCapture[]): string[] {
  const files = disks.flatMap(({ files }) => files).filter(isSameFile);
  const folders = new Set(files.map(({ path }) => dirname(path)));
  return [...folders].filter((folder) => dirname(folder) === tmpdir() && OWN_FOLDER.test(basename(folder)));
}

function image(files: readonly FileReference[], here: (file: FileReference) => string): string {
  const [file] = files;
  if (!file) throw violation('a drive without a file');
  return here(file);
}

/** Whether a file, which is being written, is the one that is meant. */
function isSameFile({ path, device, inode }: FileReference): boolean {
  try {
    const stat = statSync(path, { bigint: true });
    return stat.dev.toString() === device && stat.ino.toString() === inode;
  } catch {
    return false;
  }
}

function notHere(index: number, { path }: FileReference): never {
  throw new MigrationError(
    `drives[${index}]: ${path} is not the same file at the target as at the source; put it where both reach it, or give ` +
      'the target one with the same contents as drives',
  );
}
