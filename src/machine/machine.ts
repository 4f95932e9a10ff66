import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { Worker } from 'node:worker_threads';
import type { ConsoleSize } from '../backends/port-stream.js';
import type { HostForward } from '../backends/user-network/host-forward.js';
import { errnoName, errorFromData, TsvisorError, UsageError } from '../errors.js';
import { addon } from '../kvm/addon.js';
import { type MachineConfig, type ResolvedConfig, resolveConfig } from './config.js';
import { type Deferred, deferred } from './deferred.js';
import type { MachineEnd, MachineStats } from './end.js';
import type { ControlAnswer, ControlRequest, MachineMessage, MachineState, MachineThreadData } from './messages.js';
import { UserNetworks } from './user-networks.js';

const DOORBELL = new Uint8Array(new BigUint64Array([1n]).buffer);

/** Host-side hooks of a machine. */
export interface MachineOptions {
  /** Receives the machine thread's log lines; silent by default. */
  readonly onLog?: (level: 'debug' | 'info' | 'warn', message: string) => void;
}

/**
 * A virtual machine. It runs on a thread of its own: nothing here blocks, and a busy caller does not stall the guest.
 *
 * ```ts
 * await using machine = await Machine.create({ kernel: 'vmlinux', initrd: 'initramfs.cpio' });
 * machine.serial.pipe(process.stdout);
 * await machine.start();
 * const end = await machine.wait();
 * ```
 */
export class Machine implements AsyncDisposable {
  /** ttyS0: what the guest prints is read, what is written the guest reads; both with back-pressure. */
  readonly serial: Duplex;
  readonly #ports: readonly { readonly name: string; readonly console: boolean; readonly stream: Duplex }[];
  readonly #worker: Worker;
  readonly #doorbell: number;
  readonly #descriptors: number[];
  readonly #streams: Duplex[] = [];
  readonly #networks: UserNetworks;
  readonly #exited: Promise<void>;
  readonly #ended = deferred<MachineEnd>();
  readonly #pending = new Map<number, Deferred<ControlAnswer>>();
  readonly #onLog: NonNullable<MachineOptions['onLog']>;
  #nextId = 1;
  readonly #ready = deferred<void>();
  #final: { end: MachineEnd; stats: MachineStats } | undefined;
  #failure: Error | undefined;

  private constructor(config: ResolvedConfig, options: MachineOptions, networks: UserNetworks) {
    this.#networks = networks;
    this.#onLog = options.onLog ?? (() => {});
    this.#doorbell = checked('eventfd', addon.eventfd(0));
    this.#descriptors = [this.#doorbell];
    const [serial, serialThere] = this.#openStream();
    this.serial = serial;
    const consolePorts: number[] = [];
    this.#ports = config.consolePorts.map(({ name, console }) => {
      const [stream, there] = this.#openStream();
      consolePorts.push(there);
      return { name, console, stream };
    });
    const networkStreams = config.networks.map(({ tap }, index) => {
      if (tap !== undefined) return undefined;
      const [stream, there] = this.#openStream();
      networks.attach(index, stream);
      return there;
    });

    const data: MachineThreadData = {
      config,
      doorbell: this.#doorbell,
      serial: serialThere,
      consolePorts,
      networks: networkStreams,
      logs: options.onLog !== undefined,
    };
    this.#worker = new Worker(new URL('./machine-thread.js', import.meta.url), {
      name: 'tsvisor-machine',
      workerData: data,
      execArgv: [],
    });
    this.#worker.on('message', (message: MachineMessage) => this.#receive(message));
    this.#worker.on('error', (error) => this.#fail(error));
    // process.exit() waits for every Worker, and one inside KVM_RUN only leaves it when its doorbell rings.
    const stopAtExit = () => this.#send('stop');
    process.on('exit', stopAtExit);
    this.#exited = new Promise((resolve) => {
      this.#worker.on('exit', () => {
        process.removeListener('exit', stopAtExit);
        this.#fail(new TsvisorError('ERR_INTERNAL', 'the machine thread exited without saying why'));
        for (const fd of this.#descriptors) addon.close(fd);
        this.#descriptors.length = 0;
        void this.#networks.close();
        resolve();
      });
    });
  }

  /**
   * Makes a machine with its kernel loaded, ready to start.
   * @throws UsageError, ImageError, MemoryError, NetworkError, KvmError: see their codes.
   */
  static async create(config: MachineConfig, options: MachineOptions = {}): Promise<Machine> {
    const resolved = resolveConfig(config);
    const networks = await UserNetworks.open(config.networks ?? []);
    let machine: Machine | undefined;
    try {
      machine = new Machine(resolved, options, networks);
      await machine.#ready.promise;
      return machine;
    } catch (error) {
      await machine?.close();
      await networks.close();
      throw error;
    }
  }

  /** Ports of this host that lead to the guest, as they really are: a `hostPort` of 0 was chosen by the host. */
  get hostForwards(): readonly HostForward[] {
    return this.#networks.hostForwards;
  }

  /** Runs the guest from its entry point. */
  async start(): Promise<void> {
    await this.#request('start');
  }

  /** Stops the vCPU where it is; devices too. Resolves when it has stopped. */
  async pause(): Promise<void> {
    await this.#request('pause');
  }

  /** Goes on after pause(). */
  async resume(): Promise<void> {
    await this.#request('resume');
  }

  /** Ends the machine at once, as if its power were cut. No effect on one that has ended. */
  async stop(): Promise<MachineEnd> {
    if (!this.#final && !this.#failure) {
      // The guest may end between the check and the request: then wait() tells how.
      await this.#request('stop').catch(() => {});
    }
    return this.wait();
  }

  /**
   * The host's end of a console port: what the guest sends is read, what is written the guest gets; both with
   * back-pressure. Once it is destroyed, the guest's output is discarded.
   * @param name as in the configuration's `consolePorts`. @throws UsageError if there is none of that name.
   */
  port(name: string): Duplex {
    return this.#portNamed(name).stream;
  }

  /**
   * Tells the guest the size of the terminal at a console port, 1 to 65535 each way; its programs get SIGWINCH. Before
   * start() it is the size from the beginning.
   * @throws UsageError if there is no such console.
   */
  async resizeConsole(name: string, size: ConsoleSize): Promise<void> {
    const { rows, columns } = size;
    const entry = this.#portNamed(name);
    if (!entry.console) throw new UsageError(`console port '${name}' has no size: it is not a console`);
    if (![rows, columns].every((n) => Number.isInteger(n) && n >= 1 && n <= 65535)) {
      throw new UsageError(`console port '${name}': ${rows} rows and ${columns} columns are not 1 to 65535 each`);
    }
    await this.#request('resize', { port: this.#ports.indexOf(entry), size: { rows, columns } });
  }

  /** State and statistics now. */
  async query(): Promise<{ state: MachineState; stats: MachineStats }> {
    if (this.#final) return { state: 'ended', stats: this.#final.stats };
    return this.#request('query');
  }

  /** Resolves when the machine has ended, however it did. @throws TsvisorError when tsvisor itself failed. */
  wait(): Promise<MachineEnd> {
    return this.#ended.promise;
  }

  /** Ends the machine if it runs and releases all it held: thread, descriptors, memory. */
  async close(): Promise<void> {
    if (!this.#final && !this.#failure) await this.stop().catch(() => {});
    await this.#worker.terminate();
    await this.#exited;
    await this.#networks.close();
    await Promise.all(this.#streams.map(destroyed));
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** A socketpair: the main thread's end as a stream, the machine thread's as a descriptor. */
  #openStream(): [Duplex, number] {
    const pair = addon.socketpair();
    if (typeof pair === 'number') {
      for (const fd of this.#descriptors) addon.close(fd);
      for (const stream of this.#streams) stream.destroy();
      throw new TsvisorError('ERR_INTERNAL', `socketpair: ${errnoName(-pair)}`);
    }
    const [here, there] = pair;
    this.#descriptors.push(there);
    addon.release(here); // the Socket closes it
    const stream = new Socket({ fd: here, readable: true, writable: true });
    // The machine's end of the pair disappears with its thread, whatever was still to be written.
    stream.on('error', () => {});
    this.#streams.push(stream);
    return [stream, there];
  }

  #portNamed(name: string) {
    const port = this.#ports.find((port) => port.name === name);
    if (port) return port;
    const names = this.#ports.map((port) => port.name).join(', ');
    throw new UsageError(`there is no console port '${name}'; this machine has ${names || 'none'}`);
  }

  #request(command: ControlRequest['command'], resize?: ControlRequest['resize']): Promise<ControlAnswer> {
    if (this.#failure) return Promise.reject(this.#failure);
    if (this.#final) {
      const why = `the machine has ended (${this.#final.end.message}): it cannot ${command}`;
      return Promise.reject(new TsvisorError('ERR_MACHINE_STATE', why));
    }
    const pending = deferred<ControlAnswer>();
    this.#pending.set(this.#send(command, resize), pending);
    return pending.promise;
  }

  #send(command: ControlRequest['command'], resize?: ControlRequest['resize']): number {
    const id = this.#nextId++;
    this.#worker.postMessage({ id, command, ...(resize && { resize }) } satisfies ControlRequest);
    addon.write(this.#doorbell, DOORBELL, 0, DOORBELL.length);
    return id;
  }

  #receive(message: MachineMessage): void {
    switch (message.type) {
      case 'ready':
        this.#ready.resolve();
        break;
      case 'failed':
        this.#fail(errorFromData(message.error));
        break;
      case 'reply':
        this.#pending.get(message.id)?.resolve(message.answer);
        this.#pending.delete(message.id);
        break;
      case 'log':
        this.#onLog(message.level, message.message);
        break;
      case 'ended':
        this.#final = { end: message.end, stats: message.stats };
        this.#settle(new TsvisorError('ERR_MACHINE_STATE', `the machine has ended (${message.end.message})`));
        this.#ended.resolve(message.end);
        break;
    }
  }

  #fail(error: Error): void {
    if (this.#failure || this.#final) return;
    this.#failure = error;
    this.#ready.reject(error);
    this.#ended.reject(error);
    this.#settle(error);
  }

  #settle(error: Error): void {
    for (const pending of this.#pending.values()) pending.reject(error);
    this.#pending.clear();
  }
}

async function destroyed(stream: Duplex): Promise<void> {
  if (stream.destroyed) return;
  const closed = new Promise((resolve) => stream.once('close', resolve));
  stream.destroy();
  await closed;
}

function checked(call: string, result: number): number {
  if (result < 0) throw new TsvisorError('ERR_INTERNAL', `${call}: ${errnoName(-result)}`);
  return result;
}
