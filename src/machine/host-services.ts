import { ByteStream } from '../backends/byte-stream.js';
import type { Disk } from '../backends/disk/disk.js';
import { closeDrives, openDrives } from '../backends/disk/open-drives.js';
import { FrameStream } from '../backends/frame-stream.js';
import { PortStream } from '../backends/port-stream.js';
import { Tap } from '../backends/tap/tap.js';
import { VsockChannel } from '../backends/vsock/channel.js';
import type { RunHost } from '../kvm/addon.js';
import { type NetBackend, Offload } from '../virtio/net/backend.js';
import { ConsoleTail } from './console-tail.js';
import type { MachineEnd } from './end.js';
import { FdEvents } from './fd-events.js';
import type { DeviceReport, MachineMessage, MachineThreadData } from './messages.js';
import { MachineRings } from './polled-rings.js';
import { RateLimit, WARNINGS_PER_MINUTE } from './rate-limit.js';
import type { LoopMember, RunLoop } from './run-loop.js';
import { Statistics } from './statistics.js';
import type { VcpuRunner } from './vcpu-runner.js';

/** What outlives a guest's reset on a machine thread: its place in the loop, the host ends of devices, the counters. */
export class HostServices implements LoopMember, Disposable {
  waiter: LoopMember['waiter'];
  readonly runHost: RunHost;
  readonly events: FdEvents<LoopMember>;
  readonly statistics = new Statistics();
  /** Where the machine thread has time to look at them: not with the vCPU on it. */
  readonly rings: MachineRings | undefined;
  readonly serial: ByteStream | undefined;
  /** What the guest's kernel said last: on ttyS0, or without it on hvc0. */
  readonly consoleTail: ConsoleTail;
  /** In the order of the configuration. Their writes, their locks outlive a reset. */
  readonly drives: Disk[] = [];
  /** In the order of the configuration. */
  readonly consolePorts: readonly PortStream[];
  readonly networks: (NetBackend & Disposable)[] = [];
  readonly vsock: VsockChannel | undefined;
  readonly #post: (message: MachineMessage) => void;
  #end: MachineEnd | undefined;
  #failure: Error | undefined;
  #draining = false;

  readonly #loop: RunLoop;
  /** Whether each vCPU has a thread of its own. */
  readonly #vcpuThreads: boolean;
  readonly #vcpus: number[] = [];
  readonly #logs: boolean;
  #running = false;
  #holds = 0;
  readonly #guestWarnings = new RateLimit(WARNINGS_PER_MINUTE);

  /** @throws DriveError, NetworkError */
  constructor(loop: RunLoop, data: MachineThreadData, post: (message: MachineMessage) => void) {
    this.#loop = loop;
    this.runHost = loop.host;
    this.events = new FdEvents(loop.host, loop.tokens, this);
    this.#vcpuThreads = loop.shared || data.config.vcpuThreads || data.config.cpus > 1;
    if (this.#vcpuThreads) {
      this.rings = new MachineRings(loop, this.events, this.#vcpus);
    }
    this.#logs = data.logs;
    this.serial = data.config.serial ? new ByteStream(data.serial, this.events) : undefined;
    this.consoleTail = new ConsoleTail(data.consoleTail);
    this.consolePorts = data.config.consolePorts.map(
      ({ name, console }, i) => new PortStream(name, console, data.consolePorts[i] as number, this.events),
    );
    const hvc0 = this.serial ? undefined : this.consolePorts.find(({ console }) => console);
    if (hvc0) hvc0.tail = this.consoleTail;
    this.vsock = data.vsock === undefined ? undefined : new VsockChannel(data.vsock, this.events);
    this.#post = post;
    try {
      this.drives.push(...openDrives(data.config.drives));
      data.config.networks.forEach(({ type, tap }, index) => {
        const { events, networks } = this;
        const offloads = type === 'user' ? Offload.checksum | Offload.tso4 : 0;
        networks.push(
          tap === undefined ? new FrameStream(data.networks[index] as number, events, offloads) : new Tap(tap, events),
        );
      });
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** Whether the machine is to run; held vCPUs wait all the same. */
  setRunning(running: boolean): void {
    this.#running = running;
    this.#setRunnable(running && this.#holds === 0);
  }

  #setRunnable(runnable: boolean): void {
    this.runHost.setRunnable(this.#vcpus, runnable);
    this.rings?.setRunning(runnable);
  }

  /** @returns its index in the RunHost. It runs with the others. */
  attachVcpu(runner: VcpuRunner): number {
    const index = this.#loop.attachVcpu(runner, this.#vcpuThreads);
    this.#vcpus.push(index);
    return index;
  }

  detachVcpu({ index }: VcpuRunner): void {
    this.#loop.detachVcpu(index);
    this.#vcpus.splice(this.#vcpus.indexOf(index), 1);
  }

  /** The machine is ready to run. Resolves with why its guest ended. @throws what one of its events threw. */
  async run(): Promise<MachineEnd> {
    this.setRunning(this.#running);
    await this.#loop.until(this);
    if (this.#end) return this.#end;
    throw this.#failure;
  }

  get due(): boolean {
    if (this.#draining) return this.#drained;
    return this.#end !== undefined || this.#failure !== undefined;
  }

  /** After the guest's end, nothing counts: memory may be lost. */
  fail(error: Error): void {
    if (!this.#end) this.#failure ??= error;
  }

  rest(): void {
    this.#setRunnable(false);
  }

  /**
   * Keeps the vCPUs from running until the function that it returns is called: for the time in which a device that was
   * reset still uses guest memory. The machine thread goes on.
   */
  holdVcpus(): () => void {
    this.#holds++;
    this.setRunning(this.#running);
    let held = true;
    return () => {
      if (held) this.#holds--;
      held = false;
      this.setRunning(this.#running);
    };
  }

  /** Why this run of the guest is over; undefined while it is not. The run loop looks after every dispatch. */
  get end(): MachineEnd | undefined {
    return this.#end;
  }

  /** The first reason counts. */
  finish(end: MachineEnd): void {
    this.#end ??= end;
  }

  /** The guest starts anew. */
  clearEnd(): void {
    this.#end = undefined;
  }

  /** Takes what the guest has still in its console's queues at its end, before its memory goes. */
  keepOutput(): void {
    for (const port of this.consolePorts) port.end();
  }

  /** Resolves when what the guest said last is in its sockets, or nobody will read it. After the guest's end. */
  async drain(): Promise<void> {
    this.events.close(); // the devices are gone
    this.serial?.drain(this.events);
    for (const port of this.consolePorts) port.drain(this.events);
    this.#draining = true;
    await this.#loop.until(this);
  }

  get #drained(): boolean {
    return (this.serial?.drained ?? true) && this.consolePorts.every((port) => port.drained);
  }

  /**
   * Why a guest that reset itself did so: a panic resets at once, after a message on the console (`panic=-1`). A guest
   * may forge the message, to its own harm.
   */
  reasonOfReset(end: MachineEnd): MachineEnd {
    if (end.reason !== 'guest-reset') return end;
    const panic = /^(?:\[ *\d+\.\d+\] )?Kernel panic - not syncing: (.*)$/m.exec(this.consoleTail.sinceMark());
    if (!panic) return end;
    return { reason: 'guest-panic', code: null, message: `the guest’s kernel panicked: ${panic[1]}` };
  }

  /** The host could not serve a request of a drive. */
  driveFailed(drive: number, message: string, onError: 'report' | 'end'): void {
    if (onError === 'end') this.finish({ reason: 'drive-failure', code: null, message });
    if (this.guestWarning(message)) this.#post({ type: 'drive-error', drive, message });
  }

  log(level: 'debug' | 'info' | 'warn', message: string): void {
    if (this.#logs) this.#post({ type: 'log', level, message });
  }

  /** A warning that a guest can cause as often as it likes. @returns whether it was one of the few that are passed on. */
  guestWarning(message: string): boolean {
    const passed = this.#guestWarnings.take();
    if (passed) this.log('warn', message);
    return passed;
  }

  /** What a user's device has to say. @throws DataCloneError */
  report(report: DeviceReport): void {
    this.#post(report);
  }

  /** When the last guest has ended. Whoever hears of the end finds the images complete. @throws DriveError */
  closeDrives(): void {
    closeDrives(this.drives.splice(0));
  }

  [Symbol.dispose](): void {
    this.serial?.close();
    for (const network of this.networks) network[Symbol.dispose]();
    this.vsock?.[Symbol.dispose]();
    this.events.close();
    this.closeDrives();
  }
}
