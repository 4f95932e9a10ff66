import { existsSync } from 'node:fs';
import { DriveError } from '../../errors.js';
import type { Disk } from './disk.js';
import { closeImage, identityOf, openImage } from './image-file.js';
import { createOverlay, openOverlay } from './overlay-file.js';
import { OverlayImage } from './overlay-image.js';
import { RawImage } from './raw-image.js';

/** What of a drive's configuration is about its host side. */
export interface DriveSource {
  readonly file: string;
  readonly readOnly: boolean;
  readonly cache: 'writeback' | 'none' | 'unsafe';
  readonly overlay: string | undefined;
}

/** Opens the drives of a machine, all or none. @throws DriveError that names the file. */
export function openDrives(drives: readonly DriveSource[]): Disk[] {
  const disks: Disk[] = [];
  const uses: Use[] = [];
  try {
    drives.forEach((drive, index) => {
      disks.push(openDrive(drive, (path, writable) => use(uses, `drives[${index}]`, path, writable)));
    });
    return disks;
  } catch (error) {
    closeDrives(disks);
    throw error;
  }
}

/** Closes every one of them. @throws DriveError the first that could not be made durable. */
export function closeDrives(disks: readonly Disk[]): void {
  const errors: unknown[] = [];
  for (const disk of disks) {
    try {
      disk.close();
    } catch (error) {
      errors.push(error);
    }
  }
  if (errors.length > 0) throw errors[0];
}

/** A file that a drive of this machine uses. */
interface Use {
  readonly drive: string;
  readonly identity: string;
  readonly writable: boolean;
}

/** Locks tell machines apart; inside of one this says it plainer. */
function use(uses: Use[], drive: string, path: string, writable: boolean): void {
  const identity = identityOf(path);
  if (identity === undefined) return; // openImage() says why
  const other = uses.find((one) => one.identity === identity && (writable || one.writable));
  if (other) {
    const twice =
      other.drive === drive ? `${drive} has ${path} as file and as overlay` : `${path}: in use by ${other.drive} too`;
    throw new DriveError(`${twice}; give each a file of its own, or make both readonly`);
  }
  uses.push({ drive, identity, writable });
}

function openDrive(drive: DriveSource, use: (path: string, writable: boolean) => void): Disk {
  const { file, readOnly, cache, overlay } = drive;
  const direct = cache === 'none';
  const unsafe = cache === 'unsafe';
  const writable = !readOnly && overlay === undefined;
  use(file, writable);
  const image = openImage(file, { writable, direct });
  if (overlay === undefined) return new RawImage(file, image, { readOnly, unsafe });
  try {
    if (!existsSync(overlay)) createOverlay(overlay, image, file);
    use(overlay, true);
    return new OverlayImage(overlay, image, openOverlay(overlay, image, file, direct), unsafe);
  } catch (error) {
    closeImage(image);
    throw error;
  }
}
