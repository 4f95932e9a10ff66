import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { temporaryFolder } from '../../support/temporary-folder.js';
import { BlkRig, OK, openDrive, SECTOR } from '../../support/virtio/blk-rig.js';
import { expectBytes, noise } from '../../support/virtio/disk-model.js';

const folder = temporaryFolder();
let count = 0;

describe.each([
  ['an image', 'writeback', false],
  ['an overlay', 'writeback', true],
  ['an overlay that is not flushed', 'unsafe', true],
] as const)('%s that is handed over', (_, cache, overlaid) => {
  function open() {
    const name = join(folder, String(count++));
    writeFileSync(`${name}.img`, noise(1 << 20, 1));
    const overlay = overlaid ? `${name}.overlay` : undefined;
    const again = () => new BlkRig(openDrive(`${name}.img`, { cache, overlay }));
    return { rig: again(), again, files: () => readFileSync(overlay ?? `${name}.img`) };
  }

  test('has all that was written, and is another’s until that lets go of it', () => {
    const { rig, again } = open();
    const data = noise(SECTOR, 2);
    expect(rig.write(5, data)).toBe(OK);
    expect(again).toThrow('in use by another machine');

    rig.disk.handOver();
    const other = again();
    expectBytes(other.read(5, SECTOR).data, data);
    expect(() => rig.disk.takeBack()).toThrow('in use by another machine');
    other.close();

    rig.disk.takeBack();
    expect(again).toThrow('in use by another machine');
    expectBytes(rig.read(5, SECTOR).data, data);
    expect(rig.write(6, data)).toBe(OK);
    rig.close();
    const last = again();
    expectBytes(last.read(6, SECTOR).data, data);
    last.close();
  });

  test('is not written by who handed it over when that closes it', () => {
    const { rig, again, files } = open();
    expect(rig.write(0, noise(SECTOR, 2))).toBe(OK);
    rig.disk.handOver();
    const other = again();
    expect(other.write(512, noise(SECTOR, 3))).toBe(OK);
    other.close();
    const before = files();
    rig.close();
    expect(files().equals(before)).toBe(true);
  });
});

test('a read-only image is shared, handed over or not', () => {
  const file = join(folder, 'shared.img');
  writeFileSync(file, noise(1 << 20, 1));
  const disk = openDrive(file, { readOnly: true });
  disk.handOver();
  openDrive(file, { readOnly: true }).close();
  disk.takeBack();
  disk.close();
});
