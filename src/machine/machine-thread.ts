import { type MessagePort, parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import { errorToData } from '../errors.js';
import { DEFAULT_MEMORY } from './config.js';
import { Control } from './control.js';
import type { EndReason, MachineEnd } from './end.js';
import { GuestRam } from './guest-ram.js';
import { Hardware } from './hardware.js';
import { HostServices } from './host-services.js';
import type { MachineMessage, MachineThreadData, ThreadOrder } from './messages.js';
import { RunLoop } from './run-loop.js';
import { UserDevices } from './user-devices/user-devices.js';
import { VirtualMachine } from './virtual-machine.js';

/** Ends after which nobody looks for the guest's last output: it is wanted no more, or its memory is lost. */
const WITHOUT_OUTPUT: ReadonlySet<EndReason> = new Set(['stopped', 'migrated', 'page-source-failure']);

/**
 * Runs a machine until it is over, one way or the other, and says so.
 * @returns whether it can have left nothing on this thread: it did not fail, and there was no code of its user's.
 */
async function run(loop: RunLoop, data: MachineThreadData): Promise<boolean> {
  const post = (message: MachineMessage) => data.port.postMessage(message);
  loop.enter();
  try {
    using host = new HostServices(loop, data, post);
    const end = await runGuest(data, host, post);
    host.closeDrives();
    post({ type: 'ended', end, stats: host.statistics.snapshot() });
    await host.drain();
    return data.config.devices.length === 0 && data.origin?.pages === undefined;
  } catch (error) {
    post({ type: 'failed', error: errorToData(error) });
    return false;
  } finally {
    loop.leave();
  }
}

/** Runs the guest until it ends for good; a reset powers it on again unless the configuration says otherwise. */
async function runGuest(
  { config, port, doorbell, origin, firstRequest }: MachineThreadData,
  host: HostServices,
  post: (message: MachineMessage) => void,
): Promise<MachineEnd> {
  using devices = await UserDevices.load(config, host);
  let machine = origin
    ? await VirtualMachine.restore(config, host, devices, origin)
    : await VirtualMachine.build(config, host, devices);
  try {
    using control = new Control(machine, origin ? 'paused' : 'created', host, devices, {
      port,
      doorbell,
      firstRequest,
    });
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
const { memory = DEFAULT_MEMORY, port }: { memory?: number; port: MessagePort } = workerData;

/** Several machines, now and then. */
function share(doorbell: number): void {
  const loop = new RunLoop(true);
  const accept = (data: MachineThreadData) => void run(loop, data).then(() => gone(data.port, false));
  loop.onDoorbell(doorbell, () => {
    for (let m = receiveMessageOnPort(messages); m; m = receiveMessageOnPort(messages)) accept(m.message);
  });
  obey = async (order) => accept(order as MachineThreadData);
}

/** Of those that have it to themselves, one after the other. */
let loop: RunLoop | undefined;

/** One machine, then perhaps another. */
let obey = async (order: ThreadOrder): Promise<void> => {
  if (order === 'end') {
    loop?.[Symbol.dispose]();
    messages.off('message', take);
  } else if ('shared' in order) share(order.shared);
  else if ('prepare' in order) await Hardware.prepare(order.prepare);
  else {
    loop ??= new RunLoop(false);
    GuestRam.keep = order.origin?.pages === undefined;
    const clean = (await run(loop, { ...order, port })) && loop.empty;
    if (!clean) {
      loop[Symbol.dispose]();
      messages.off('message', take);
    }
    gone(port, clean);
  }
};

function gone(port: MessagePort, reusable: boolean): void {
  port.postMessage({ type: 'gone', reusable } satisfies MachineMessage);
}

let busy = Hardware.prepare(memory);

function take(order: ThreadOrder): void {
  busy = busy.then(() => obey(order));
}

// Not before all is loaded: a thread that ends while it loads leaves Node's descriptors of the modules open.
void busy.then(() => messages.on('message', take));
