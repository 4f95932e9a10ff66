// @ts-check
/** A guest uses a device of four registers with devmem: `node main.js`. */
import { once } from 'node:events';
import { Machine } from 'tsvisor';

const machine = await Machine.create({
  devices: [{ module: new URL('./device.js', import.meta.url), name: 'counter', options: { alarm: 42 } }],
});
try {
  const counter = machine.device('counter');
  const register = (/** @type {number} */ offset) => `0x${(counter.address + offset).toString(16)}`;
  await machine.start();
  const { stdout } = await machine.exec(`devmem ${register(0)} 32 40; devmem ${register(0)}`);
  process.stdout.write(`The guest set the counter to ${stdout}`);
  await machine.exec(`devmem ${register(12)} 32 10000`); // from now on it counts every 10 ms
  const [message] = await once(counter, 'message');
  process.stdout.write(`The counter says ${JSON.stringify(message)}\n`);
  const alarm = await machine.exec(`devmem ${register(8)}; devmem ${register(12)} 32 0`);
  process.stdout.write(`The guest finds the alarm to be ${alarm.stdout}`);
} finally {
  await machine.close();
}
