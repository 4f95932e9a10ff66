import { type MessagePort, parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import { errorToData } from '../errors.js';
import { addon } from '../kvm/addon.js';
import { EPOLLIN } from '../kvm/generated/abi.js';
import type { MachineEnd } from './end.js';
import { HostServices } from './host-services.js';
import type { ControlRequest, DeviceRequest, MachineMessage, MachineState, MachineThreadData } from './messages.js';
import { runLoop } from './run-loop.js';
import { UserDevices } from './user-devices/user-devices.js';
import { VirtualMachine } from './virtual-machine.js';

/**
 * Control requests from the main thread. The doorbell's eventfd brings the run loop here; this thread's own event loop
 * does not run meanwhile.
 */
class Control {
  state: MachineState = 'created';
  readonly #host: HostServices;
  readonly #devices: UserDevices;
  readonly #port: MessagePort;
  readonly #doorbell: number;
  readonly #count = new Uint8Array(8);
  readonly #watch: (events: number) => void;

  constructor(host: HostServices, devices: UserDevices, port: MessagePort, doorbell: number) {
    this.#host = host;
    this.#devices = devices;
    this.#port = port;
    this.#doorbell = doorbell;
    this.#watch = host.events.add(doorbell, () => this.#receive());
    this.#watch(EPOLLIN);
  }

  #receive(): void {
    addon.read(this.#doorbell, this.#count, 0, 8);
    this.#watch(EPOLLIN); // before the messages are read, so that one sent meanwhile rings again
    for (let m = receiveMessageOnPort(this.#port); m; m = receiveMessageOnPort(this.#port)) {
      const message = m.message as ControlRequest | DeviceRequest;
      if ('device' in message) this.#devices.receive(message);
      else this.#handle(message);
    }
  }

  #handle({ id, command, resize }: ControlRequest): void {
    if (command === 'stop') {
      this.#host.finish({ reason: 'stopped', code: null, message: 'the machine was stopped' });
    } else if (command === 'start' || command === 'resume') {
      if (command === 'start') this.#host.statistics.phase('firstEntry');
      this.#host.setRunning(true);
      this.state = 'running';
    } else if (command === 'pause') {
      this.#host.setRunning(false);
      this.state = 'paused';
    } else if (command === 'resize' && resize) {
      this.#host.consolePorts[resize.port]?.resize(resize.size);
    }
    const answer = { state: this.state, stats: this.#host.statistics.snapshot() };
    this.#port.postMessage({ type: 'reply', id, answer } satisfies MachineMessage);
  }
}

/** Runs the guest until it ends for good; a reset powers it on again unless the configuration says otherwise. */
async function run(data: MachineThreadData, port: MessagePort): Promise<void> {
  const { config, doorbell } = data;
  const post = (message: MachineMessage) => port.postMessage(message);
  try {
    using host = new HostServices(data, post);
    using devices = await UserDevices.load(config, host);
    let machine = await VirtualMachine.build(config, host, devices);
    new Control(host, devices, port, doorbell);
    post({ type: 'ready', devices: devices.places });
    let end: MachineEnd;
    for (;;) {
      end = host.reasonOfReset(runLoop(machine, host));
      const last = end.reason !== 'guest-reset' || config.onReset === 'end';
      if (last && end.reason !== 'stopped') host.keepOutput();
      machine[Symbol.dispose]();
      if (last) break;
      host.log('info', 'the guest reset itself: booting it again');
      post({ type: 'reset' });
      host.clearEnd();
      host.consoleTail.mark();
      machine = await VirtualMachine.build(config, host, devices);
    }
    host.closeDrives();
    post({ type: 'ended', end, stats: host.statistics.snapshot() });
    await host.drain();
  } catch (error) {
    post({ type: 'failed', error: errorToData(error) });
  }
}

await run(workerData as MachineThreadData, parentPort as MessagePort);
