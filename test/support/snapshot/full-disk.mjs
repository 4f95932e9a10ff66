// Takes snapshots onto a disk that is too small, of one size after the other, until one fits. Runs in a mount namespace:
// full-disk.mjs KERNEL FOLDER, which becomes the disk. Prints a line of JSON for each.
import { execFileSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { Machine } from '#dist/index.js';

const [kernel, disk] = process.argv.slice(2);
execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4k', 'none', disk]);
const machine = await Machine.create({ kernel, memory: 4 * 2 ** 20 });
let dots = 0;
machine.serial.on('data', (chunk) => {
  if (chunk.includes('!')) throw new Error('the guest found that its memory and registers differ');
  dots += chunk.length;
});
const goesOn = async () => {
  for (const before = dots; dots < before + 3; ) await new Promise((resolve) => setTimeout(resolve, 5));
};
await machine.start();
await goesOn();
const attempt = async (folder, options) => {
  const failure = await machine.snapshot(folder, options).then(
    () => undefined,
    ({ code, message }) => ({ code, message }),
  );
  await goesOn();
  return failure;
};
for (let size = 4, failure = {}; failure; size += 8) {
  execFileSync('mount', ['-o', `remount,size=${size}k`, disk]);
  failure = await attempt(join(disk, 'snapshot'), {});
  console.log(JSON.stringify({ size, failure, left: readdirSync(disk) }));
}
await (await Machine.restore(join(disk, 'snapshot'))).close();

// What a differential one took before it failed is in no snapshot: the next one must not be based on the one before.
execFileSync('mount', ['-o', 'remount,size=1m', disk]);
const track = await attempt(join(disk, 'base'), { track: true });
execFileSync('mount', ['-o', 'remount,size=1m,nr_inodes=9', disk]);
const difference = { differential: true };
const results = [track, await attempt(join(disk, 'full'), difference), await attempt(join(disk, 'next'), difference)];
console.log(JSON.stringify({ results, left: readdirSync(disk).sort() }));
await machine.close();
