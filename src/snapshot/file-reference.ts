import { type BigIntStats, statSync } from 'node:fs';
import { resolve } from 'node:path';
import type { FileReference } from './format.js';

/** How a file of the host can be known again, exactly as it is. @throws the error of stat(2). */
export function referenceTo(path: string): FileReference {
  const absolute = resolve(path);
  return describe(absolute, statSync(absolute, { bigint: true }));
}

/**
 * Whether a file still is what was referred to. A snapshot may be anybody's: since nobody can foretell the inode and the
 * change time of a file that he has no access to, it leads to no file that its author had not.
 */
export function isUnchanged(reference: FileReference): boolean {
  try {
    const now = referenceTo(reference.path);
    return Object.entries(now).every(([name, value]) => reference[name as keyof FileReference] === value);
  } catch {
    return false;
  }
}

function describe(path: string, stat: BigIntStats): FileReference {
  return {
    path,
    device: stat.dev.toString(),
    inode: stat.ino.toString(),
    size: stat.size.toString(),
    modifiedNs: stat.mtimeNs.toString(),
    changedNs: stat.ctimeNs.toString(),
  };
}
