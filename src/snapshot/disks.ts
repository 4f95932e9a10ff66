import { execFile } from 'node:child_process';
import { existsSync, lstatSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { SnapshotError } from '../errors.js';
import type { ResolvedDrive } from '../machine/device-config.js';
import { isUnchanged, referenceTo } from './file-reference.js';
import type { DiskCapture, FileReference } from './format.js';

const run = promisify(execFile);

/**
 * Notes or copies what drives hold, while their machine is held and their contents are in their files.
 * @param into the snapshot's folder.
 */
export async function captureDisks(
  drives: readonly ResolvedDrive[],
  mode: 'copy' | 'reference',
  into: string,
  signal?: AbortSignal,
): Promise<DiskCapture[]> {
  const captured: DiskCapture[] = [];
  for (const [index, { file, overlay, readOnly }] of drives.entries()) {
    if (readOnly || mode === 'reference') {
      const files = overlay === undefined ? [file] : [file, overlay];
      captured.push({ kind: 'reference', files: files.map((path) => noted(index, path)) });
    } else if (overlay === undefined) {
      await copyFile(file, join(into, copyName(index, 'raw')), signal);
      captured.push({ kind: 'raw', files: [] });
    } else {
      await copyFile(overlay, join(into, copyName(index, 'overlay')), signal);
      captured.push({ kind: 'overlay', files: [noted(index, file)] });
    }
  }
  return captured;
}

function noted(index: number, path: string): FileReference {
  try {
    return referenceTo(path);
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const why = code === 'ENOENT' ? 'it is not there any more' : (code ?? message);
    throw new SnapshotError(`snapshot: ${path}, which drives[${index}] has open: ${why}`, { cause });
  }
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
 * Where the drives of a restored machine are. Paths of the host come from the captures alone, and only if they lead to
 * what was there.
 * @param captures of the machine's drives. @param folder of the snapshot. @param scratch makes a folder that goes with
 * the machine.
 * @throws SnapshotError when a file is not what it was and no other is given.
 */
export async function restoreDisks(
  captures: readonly DiskCapture[],
  folder: string,
  overrides: readonly (DriveOverride | undefined)[],
  scratch: () => Promise<string>,
): Promise<{ file: string; overlay: string | undefined }[]> {
  const restored: { file: string; overlay: string | undefined }[] = [];
  for (const [index, { kind, files }] of captures.entries()) {
    const { file, overlay } = overrides[index] ?? {};
    const [image, writes] = files;
    const there = (reference: FileReference | undefined) => reference && unchangedPath(index, reference);
    const own = async () => overlay ?? join(await scratch(), copyName(index, 'overlay'));
    if (kind === 'reference') {
      restored.push({ file: file ?? (there(image) as string), overlay: overlay ?? there(writes) });
    } else if (kind === 'raw') {
      const base = file ?? copyIn(folder, index, 'raw');
      const path = await own();
      if (existsSync(path))
        throw new SnapshotError(`drives[${index}].overlay: ${path} exists already; name a new file`);
      restored.push({ file: base, overlay: path });
    } else {
      const base = file ?? (there(image) as string);
      const path = await own();
      await copyFile(copyIn(folder, index, 'overlay'), path);
      restored.push({ file: base, overlay: path });
    }
  }
  return restored;
}

function unchangedPath(index: number, reference: FileReference): string {
  if (isUnchanged(reference)) return reference.path;
  throw new SnapshotError(
    `snapshot: ${reference.path} of drives[${index}] is missing or was changed since; give the file that has the ` +
      'contents of then as drives',
  );
}

/** A file in the snapshot's folder; a link there could lead to any of the host's. */
function copyIn(folder: string, index: number, kind: 'raw' | 'overlay'): string {
  const path = join(folder, copyName(index, kind));
  if (lstatSync(path, { throwIfNoEntry: false })?.isFile()) return path;
  throw new SnapshotError(`${path}: there is no such file, or it is none; the snapshot is damaged`);
}

/** A sparse copy, sharing blocks where the file system can, and durable; the target must not exist. */
async function copyFile(from: string, to: string, signal?: AbortSignal): Promise<void> {
  let target: FileHandle | undefined;
  try {
    target = await open(to, 'wx', 0o600);
    await run('cp', ['--sparse=always', '--reflink=auto', '--', from, to], { signal });
    await target.sync();
  } catch (cause) {
    const { stderr, message, code } = cause as NodeJS.ErrnoException & { stderr?: string };
    const why = code === 'EEXIST' ? `${to} exists already` : (stderr || message).trim().split('\n').at(-1);
    throw new SnapshotError(`snapshot: copying ${from} failed: ${why}`, { cause });
  } finally {
    await target?.close();
  }
}
