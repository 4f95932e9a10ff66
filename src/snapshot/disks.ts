import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { SnapshotError } from '../errors.js';
import type { ResolvedDrive } from '../machine/device-config.js';
import { isUnchanged, referenceTo } from './file-reference.js';
import type { DiskCapture } from './format.js';

const run = promisify(execFile);

/**
 * Notes or copies what drives hold, while their machine is held and their contents are in their files.
 * @param into the snapshot's folder.
 */
export async function captureDisks(
  drives: readonly ResolvedDrive[],
  mode: 'copy' | 'reference',
  into: string,
): Promise<DiskCapture[]> {
  const captured: DiskCapture[] = [];
  for (const [index, { file, overlay, readOnly }] of drives.entries()) {
    if (readOnly || mode === 'reference') {
      const files = overlay === undefined ? [file] : [file, overlay];
      captured.push({ kind: 'reference', files: files.map(referenceTo) });
    } else if (overlay === undefined) {
      await copyFile(file, join(into, copyName(index, 'raw')));
      captured.push({ kind: 'raw', files: [] });
    } else {
      await copyFile(overlay, join(into, copyName(index, 'overlay')));
      captured.push({ kind: 'overlay', files: [referenceTo(file)] });
    }
  }
  return captured;
}

export function copyName(index: number, kind: 'raw' | 'overlay'): string {
  return `disk-${index}.${kind}`;
}

/** What restore() is told of a drive. */
export interface DriveOverride {
  /** Opened in place of the file that the snapshot refers to. */
  readonly file?: string;
  /** Where the guest's writes go from now on; must not exist. Default: a file that goes with the machine. */
  readonly overlay?: string;
}

/**
 * The drives of a restored machine.
 * @param drives as they were. @param folder of the snapshot. @param scratch makes a folder that goes with the machine.
 * @throws SnapshotError when a file is not what it was and no other is given.
 */
export async function restoreDisks(
  drives: readonly ResolvedDrive[],
  captures: readonly DiskCapture[],
  folder: string,
  overrides: readonly (DriveOverride | undefined)[],
  scratch: () => Promise<string>,
): Promise<ResolvedDrive[]> {
  const restored: ResolvedDrive[] = [];
  for (const [index, drive] of drives.entries()) {
    const capture = captures[index];
    if (!capture) throw new SnapshotError(`snapshot: disks[${index}] is missing; the snapshot is damaged`);
    const { file, overlay } = overrides[index] ?? {};
    if (file === undefined) mustBeUnchanged(index, capture);
    const own = async () => overlay ?? join(await scratch(), copyName(index, 'overlay'));
    if (capture.kind === 'reference') {
      restored.push({ ...drive, file: file ?? drive.file, overlay: overlay ?? drive.overlay });
    } else if (capture.kind === 'raw') {
      restored.push({ ...drive, file: file ?? join(folder, copyName(index, 'raw')), overlay: await own() });
    } else {
      const path = await own();
      await copyFile(join(folder, copyName(index, 'overlay')), path);
      restored.push({ ...drive, file: file ?? drive.file, overlay: path });
    }
  }
  return restored;
}

function mustBeUnchanged(index: number, { files }: DiskCapture): void {
  const changed = files.find((file) => !isUnchanged(file));
  if (!changed) return;
  throw new SnapshotError(
    `snapshot: ${changed.path} of drives[${index}] is missing or was changed since; give the file that has the contents ` +
      'of then as drives',
  );
}

/** A sparse copy, sharing blocks where the file system can; the target must not exist. */
async function copyFile(from: string, to: string): Promise<void> {
  try {
    await run('cp', ['--no-clobber', '--sparse=always', '--reflink=auto', '--', from, to]);
  } catch (cause) {
    const { stderr, message } = cause as Error & { stderr?: string };
    const why = (stderr || message).trim().split('\n').at(-1);
    throw new SnapshotError(`snapshot: copying ${from} failed: ${why}`, { cause });
  }
}
