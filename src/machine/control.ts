import { type MessagePort, receiveMessageOnPort } from 'node:worker_threads';
import { PENDING } from '../backends/disk/disk.js';
import { errnoName, errorToData, MigrationError, SnapshotError } from '../errors.js';
import { addon } from '../kvm/addon.js';
import { EPOLLIN } from '../kvm/generated/abi.js';
import { dirtyExtents } from './dirty-extents.js';
import { Timer } from './fd-events.js';
import type { HostServices } from './host-services.js';
import type {
  ControlAnswer,
  ControlRequest,
  DeviceRequest,
  MachineMessage,
  MachineState,
  MachineThreadData,
  PageBatch,
  PagesStep,
  SavedMachine,
  SavePages,
} from './messages.js';
import { PageBatches } from './page-batches.js';
import type { UserDevices } from './user-devices/user-devices.js';
import type { VirtualMachine } from './virtual-machine.js';

/** Microseconds for which the guest stands still while its disks work. */
const HOLD_LIMIT = 30e6;

/**
 * Control requests from the main thread. The doorbell's eventfd brings the run loop here; this thread's own event loop
 * does not run meanwhile.
 */
export class Control implements Disposable {
  state: MachineState;
  #machine: VirtualMachine;
  readonly #host: HostServices;
  readonly #devices: UserDevices;
  readonly #port: MessagePort;
  readonly #doorbell: number;
  readonly #firstRequest: number;
  readonly #count = new Uint8Array(8);
  readonly #watch: (events: number) => void;
  /** From `hold` to `release`: lets the vCPUs run again. */
  #letGo: (() => void) | undefined;
  #pages: PageBatches | undefined;
  /** Requests that wait for all of memory. */
  readonly #fetching = new Set<number>();
  /** Another process may have the disks. */
  #handedOver = false;
  /** The request that waits for the devices. */
  #holding: number | undefined;
  readonly #holdLimit: Timer;

  /** @param state `created`, or `paused` for a machine that was saved. */
  constructor(
    machine: VirtualMachine,
    state: MachineState,
    host: HostServices,
    devices: UserDevices,
    { port, doorbell, firstRequest }: Pick<MachineThreadData, 'port' | 'doorbell' | 'firstRequest'>,
  ) {
    this.#machine = machine;
    this.state = state;
    this.#host = host;
    this.#devices = devices;
    this.#port = port;
    this.#doorbell = doorbell;
    this.#firstRequest = firstRequest;
    this.#holdLimit = new Timer(host.events, () => {
      this.#refuseHold(`the machine’s disks have not come to rest for ${HOLD_LIMIT / 1e6} s; take it again`);
    });
    this.#watch = host.events.add(doorbell, () => this.#receive());
    this.#watch(EPOLLIN);
  }

  /** The guest was reset: a new machine is in the place of that of before. */
  replaceMachine(machine: VirtualMachine): void {
    this.#machine = machine;
    this.#pages = undefined;
    for (const id of this.#fetching) this.#reply(id); // its memory is new, and all there
    this.#fetching.clear();
    this.#refuseHold('the guest reset itself meanwhile; take it again');
  }

  [Symbol.dispose](): void {
    this.#holdLimit.close();
    this.#host.events.remove(this.#doorbell);
  }

  #receive(): void {
    addon.read(this.#doorbell, this.#count, 0, 8);
    this.#watch(EPOLLIN); // before the messages are read, so that one sent meanwhile rings again
    for (let m = receiveMessageOnPort(this.#port); m; m = receiveMessageOnPort(this.#port)) {
      const message = m.message as ControlRequest | DeviceRequest;
      if ('device' in message) this.#devices.receive(message);
      else if (message.id >= this.#firstRequest) this.#handle(message);
    }
  }

  #handle(request: ControlRequest): void {
    const { id, command, resize } = request;
    let parts: Omit<ControlAnswer, 'state'> = {};
    if (command === 'stop') {
      this.#host.finish({ reason: 'stopped', code: null, message: 'the machine was stopped' });
    } else if (command === 'start' || command === 'resume') {
      this.#host.statistics.phase('firstEntry');
      this.#host.setRunning(true);
      this.state = 'running';
    } else if (command === 'pause') {
      this.#host.setRunning(false);
      this.state = 'paused';
    } else if (command === 'resize' && resize) {
      this.#host.consolePorts[resize.port]?.resize(resize.size);
    } else if (command === 'hold') {
      this.#hold(id);
      return;
    } else if (command === 'fetch') {
      this.#fetching.add(id);
      this.#machine.ram.whenWhole(() => {
        if (this.#fetching.delete(id)) this.#reply(id);
      });
      return;
    } else if (command === 'migrated') {
      this.#host.finish({ reason: 'migrated', code: null, message: 'the machine was moved to another process' });
    } else {
      try {
        if (command === 'query') parts = { stats: this.#host.statistics.snapshot() };
        else if (command === 'save') parts = { saved: this.#save(request.save) };
        else if (command === 'pages' && request.pages) parts = { pages: this.#givePages(request.pages) };
        else if (command === 'handOver') this.#handOver();
        else if (command === 'release') this.#release();
      } catch (error) {
        this.#refuse(id, error);
        return;
      }
    }
    this.#reply(id, parts);
  }

  /** Twice until no device works on a request: a flush of the disks takes requests of its own. */
  #hold(id: number): void {
    if (this.#letGo) {
      this.#refuse(id, new SnapshotError('snapshot: another one of this machine is being taken; wait for that'));
      return;
    }
    this.#letGo = this.#host.holdVcpus();
    this.#holding = id;
    if (!this.#machine.settle()) return; // the guest's end, or its reset: replaceMachine() tells
    this.#holdLimit.arm(HOLD_LIMIT);
    const machine = this.#machine;
    machine.whenQuiet(() => {
      if (this.#holding === id) this.#syncDisks(id);
      machine.whenQuiet(() => {
        if (this.#holding !== id) return;
        this.#endHolding();
        this.#reply(id);
      });
    });
  }

  #syncDisks(id: number): void {
    this.#host.drives.forEach((disk, index) => {
      const ioDone = (result: number): void => {
        if (result >= 0 || this.#holding !== id) return;
        const why = `${disk.path} cannot be flushed: ${errnoName(-result)}; the guest’s last writes to it may be lost`;
        this.#refuseHold(`drives[${index}]: ${why}`);
      };
      const result = disk.sync({ ioDone });
      if (result !== PENDING) ioDone(result);
    });
  }

  /** Who asked for it gets an error instead, and the guest goes on. */
  #refuseHold(why: string): void {
    if (this.#holding === undefined) return;
    this.#refuse(this.#holding, new SnapshotError(`snapshot: ${why}`));
    this.#endHolding();
    this.#release();
  }

  #endHolding(): void {
    this.#holding = undefined;
    this.#holdLimit.disarm();
  }

  #save(memory: SavePages | undefined): SavedMachine {
    const { ram } = this.#machine;
    if (!this.#letGo) throw new SnapshotError('snapshot: the machine is not held');
    const machine = this.#machine.save(this.#host);
    if (!memory) return { machine, extents: undefined, bytes: 0 };
    const { fd, pages, track } = memory;
    let written: Uint8Array | undefined;
    let extents: (readonly [number, number])[] | undefined;
    if (pages === 'dirty') {
      if (!ram.tracksDirtyPages) throw new SnapshotError('snapshot: nothing tells which pages were written since');
      written = new Uint8Array(ram.pages);
      ram.takeDirtyPages(written);
      extents = dirtyExtents(written);
    }
    const bytes = ram.save(fd, written);
    if (bytes < 0) throw new SnapshotError(`snapshot: writing the memory failed with ${errnoName(-bytes)}`);
    ram.trackDirtyPages(track);
    return { machine, extents, bytes };
  }

  #givePages(step: PagesStep): PageBatch {
    if (step === 'begin') this.#pages = new PageBatches(this.#machine.ram);
    const source = this.#pages;
    if (!source) throw new MigrationError('migration: the guest reset itself meanwhile; try again');
    if (step === 'round') source.round();
    const payload = step === 'more' ? source.take() : undefined;
    if (step === 'end') {
      source.end();
      this.#pages = undefined;
    }
    return { payload, remaining: source.remaining };
  }

  /** @throws DriveError: then none is handed over. */
  #handOver(): void {
    this.#handedOver = true;
    try {
      for (const disk of this.#host.drives) disk.handOver();
    } catch (error) {
      this.#takeBack();
      throw error;
    }
  }

  /** @throws DriveError while another process has one: try again. */
  #takeBack(): void {
    if (this.#handedOver) for (const disk of this.#host.drives) disk.takeBack();
    this.#handedOver = false;
  }

  /** @throws DriveError as takeBack(): the machine stays held. */
  #release(): void {
    this.#takeBack();
    this.#letGo?.();
    this.#letGo = undefined;
  }

  #reply(id: number, parts: Omit<ControlAnswer, 'state'> = {}): void {
    const { pages } = parts;
    const answer: ControlAnswer = { state: this.state, ...parts };
    const moved = pages?.payload ? [pages.payload.buffer as ArrayBuffer] : [];
    this.#port.postMessage({ type: 'reply', id, answer } satisfies MachineMessage, moved);
  }

  #refuse(id: number, error: unknown): void {
    this.#port.postMessage({ type: 'refusal', id, error: errorToData(error) } satisfies MachineMessage);
  }
}
