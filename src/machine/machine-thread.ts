import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import { errorToData } from '../errors.js';
import { DEFAULT_MEMORY } from './config.js';
import { Control } from './control.js';
import type { EndReason, MachineEnd } from './end.js';
import { Hardware } from './hardware.js';
import { HostServices } from './host-services.js';
import type { MachineMessage, MachineThreadData, ThreadOrder } from './messages.js';
import { RunLoop } from './run-loop.js';
import { UserDevices } from './user-devices/user-devices.js';
import { VirtualMachine } from './virtual-machine.js';

/** Ends after which nobody looks for the guest's last output: it is wanted no more, or its memory is lost. */
const WITHOUT_OUTPUT: ReadonlySet<EndReason> = new Set(['stopped', 'migrated', 'page-source-failure']);

/** Runs a machine until it is over, one way or the other, and says so. */
async function run(loop: RunLoop, data: MachineThreadData): Promise<void> {
  const post = (message: MachineMessage) => data.port.postMessage(message);
  loop.enter();
  try {
    using host = new HostServices(loop, data, post);
    const end = await runGuest(data, host, post);
    host.closeDrives();
    post({ type: 'ended', end, stats: host.statistics.snapshot() });
    await host.drain();
  } catch (error) {
    post({ type: 'failed', error: errorToData(error) });
  } finally {
    loop.leave();
  }
  post({ type: 'gone' });
}

/** Runs the guest until it ends for good; a reset powers it on again unless the configuration says otherwise. */
async function runGuest(
  { config, port, doorbell, origin }: MachineThreadData,
  host: HostServices,
  post: (message: MachineMessage) => void,
): Promise<MachineEnd> {
  using devices = await UserDevices.load(config, host);
  let machine = origin
    ? await VirtualMachine.restore(config, host, devices, origin)
    : await VirtualMachine.build(config, host, devices);
  try {
    using control = new Control(machine, origin ? 'paused' : 'created', host, devices, port, doorbell);
    post({ type: 'ready', devices: devices.places });
    for (;;) {
      const end = host.reasonOfReset(await host.run());
      const last = end.reason !== 'guest-reset' || config.onReset === 'end';
      if (last && !WITHOUT_OUTPUT.has(end.reason)) host.keepOutput();
      if (last) return end;
      machine[Symbol.dispose]();
      host.log('info', 'the guest reset itself: booting it again');
      post({ type: 'reset' });
      host.clearEnd();
      host.consoleTail.mark();
      machine = await VirtualMachine.build(config, host, devices);
      control.replaceMachine(machine);
    }
  } finally {
    machine[Symbol.dispose]();
  }
}

const messages = parentPort as NonNullable<typeof parentPort>;

function begin(order: ThreadOrder): void {
  if ('shared' in order) {
    const loop = new RunLoop(true);
    const accept = (data: MachineThreadData) => void run(loop, data);
    loop.onDoorbell(order.shared, () => {
      for (let m = receiveMessageOnPort(messages); m; m = receiveMessageOnPort(messages)) accept(m.message);
    });
    messages.on('message', accept);
  } else {
    const loop = new RunLoop(false);
    void run(loop, order).then(() => loop[Symbol.dispose]());
  }
}

// Not before all is loaded: a thread that ends while it loads leaves Node's descriptors of the modules open.
void Hardware.prepare(workerData ?? DEFAULT_MEMORY).then(() => messages.once('message', begin));
