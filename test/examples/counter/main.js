// @ts-check
/** A guest uses a device of three registers with devmem: `node main.js`. */
import { once } from 'node:events';
import { Machine } from 'tsvisor';

const machine = await Machine.create({
  devices: [{ module: new URL('./device.js', import.meta.url), name: 'counter', options: { alarm: 42 } }],
});
try {
  const counter = machine.device('counter');
  const register = (/** @type {number} */ offset) => `0x${(counter.address + offset).toString(16)}`;
  machine.serial.pipe(process.stdout);
  await machine.start();
  machine.serial.write(`devmem ${register(0)} 32 40; devmem ${register(0)}\n`);
  machine.serial.write(`devmem ${register(12)} 32 10000; sleep 1\n`); // counts every 10 ms
  const [message] = await once(counter, 'message');
  process.stdout.write(`\nThe counter says ${JSON.stringify(message)}\n`);
  machine.serial.write(`devmem ${register(8)}; devmem ${register(12)} 32 0; poweroff\n`);
  await machine.wait();
} finally {
  await machine.close();
}
