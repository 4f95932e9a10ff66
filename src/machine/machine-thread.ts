import { type MessagePort, parentPort } from 'node:worker_threads';
import { errorToData } from '../errors.js';
import { Control } from './control.js';
import type { EndReason, MachineEnd } from './end.js';
import { Hardware } from './hardware.js';
import { HostServices } from './host-services.js';
import type { MachineMessage, MachineThreadData } from './messages.js';
import { runLoop } from './run-loop.js';
import { UserDevices } from './user-devices/user-devices.js';
import { VirtualMachine } from './virtual-machine.js';

/** Ends after which nobody looks for the guest's last output: it is wanted no more, or its memory is lost. */
const WITHOUT_OUTPUT: ReadonlySet<EndReason> = new Set(['stopped', 'migrated', 'page-source-failure']);

/** Runs the guest until it ends for good; a reset powers it on again unless the configuration says otherwise. */
async function run(data: MachineThreadData, port: MessagePort): Promise<void> {
  const { config, doorbell, origin } = data;
  const post = (message: MachineMessage) => port.postMessage(message);
  try {
    using host = new HostServices(data, post);
    using devices = await UserDevices.load(config, host);
    let machine = origin
      ? await VirtualMachine.restore(config, host, devices, origin)
      : await VirtualMachine.build(config, host, devices);
    using control = new Control(machine, origin ? 'paused' : 'created', host, devices, port, doorbell);
    post({ type: 'ready', devices: devices.places });
    let end: MachineEnd;
    for (;;) {
      end = host.reasonOfReset(runLoop(machine, host));
      const last = end.reason !== 'guest-reset' || config.onReset === 'end';
      if (last && !WITHOUT_OUTPUT.has(end.reason)) host.keepOutput();
      machine[Symbol.dispose]();
      if (last) break;
      host.log('info', 'the guest reset itself: booting it again');
      post({ type: 'reset' });
      host.clearEnd();
      host.consoleTail.mark();
      machine = await VirtualMachine.build(config, host, devices);
      control.replaceMachine(machine);
    }
    host.closeDrives();
    post({ type: 'ended', end, stats: host.statistics.snapshot() });
    await host.drain();
  } catch (error) {
    post({ type: 'failed', error: errorToData(error) });
  }
}

// What comes later is read with receiveMessageOnPort.
const port = parentPort as MessagePort;
const prepared = Hardware.prepare();
// A thread that ends while it loads leaves Node's descriptors of the modules open.
port.once('message', (data: MachineThreadData) => void prepared.then(() => run(data, port)));
await prepared;
