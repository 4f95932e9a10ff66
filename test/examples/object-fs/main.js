// @ts-check
/** A guest mounts a JavaScript object: `node main.js`. */
import { Machine } from 'tsvisor';
import { serveObject } from './server.js';

/** @type {Parameters<typeof serveObject>[1] & { inbox: { kernel?: Buffer } }} */
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
  await machine.start();
  await machine.exec('mkdir /mnt; mount -t 9p -o trans=virtio,version=9p2000.L object /mnt');
  const { stdout } = await machine.exec('cat hello.txt time.txt; uname -sr >inbox/kernel', { cwd: '/mnt' });
  process.stdout.write(`The guest read:\n${stdout}The guest wrote:\n${tree.inbox.kernel}`);
} finally {
  await machine.close();
}
