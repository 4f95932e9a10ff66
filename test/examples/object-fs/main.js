// @ts-check
/** A guest mounts a JavaScript object: `node main.js`. */
import { Machine } from 'tsvisor';
import { serveObject } from './server.js';

const tree = {
  'hello.txt': 'Hello from an object.\n',
  'time.txt': () => `${new Date().toISOString()}\n`,
  inbox: {},
};

const machine = await Machine.create({
  devices: [{ module: new URL('./device.js', import.meta.url), name: 'object', options: { tag: 'object' } }],
});
try {
  serveObject(machine.device('object'), tree);
  machine.serial.pipe(process.stdout);
  await machine.start();
  for (const command of [
    'mkdir -p /mnt; mount -t 9p -o trans=virtio,version=9p2000.L object /mnt',
    'cat /mnt/hello.txt /mnt/time.txt',
    'uname -a >/mnt/inbox/kernel',
    'poweroff',
  ]) {
    machine.serial.write(`${command}\n`);
  }
  await machine.wait();
  process.stdout.write(`\nThe guest wrote: ${JSON.stringify(tree.inbox, (_, value) => text(value))}\n`);
} finally {
  await machine.close();
}

/** @param {any} value */
function text(value) {
  return value?.type === 'Buffer' ? Buffer.from(value).toString() : value;
}
