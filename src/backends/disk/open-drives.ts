import type { Disk } from './disk.js';
import { openImage } from './image-file.js';
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
  try {
    for (const drive of drives) disks.push(openDrive(drive));
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

function openDrive({ file, readOnly, cache }: DriveSource): Disk {
  const image = openImage(file, { writable: !readOnly, direct: cache === 'none' });
  return new RawImage(file, image, { readOnly, unsafe: cache === 'unsafe' });
}
