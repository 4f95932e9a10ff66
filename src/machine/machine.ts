import { EventEmitter } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import type { GuestIdentity } from '../agent/agent.js';
import type { ExecOptions, ExecResult, SpawnOptions } from '../agent/exec.js';
import type { GuestFileSystem } from '../agent/file-system.js';
import type { GuestProcess } from '../agent/process.js';
import { FramePort } from '../backends/frame-port.js';
import type { ConsoleSize } from '../backends/port-stream.js';
import type { HostForward } from '../backends/user-network/host-forward.js';
import type { Vsock } from '../backends/vsock/vsock.js';
import type { VsockHost } from '../backends/vsock/vsock-host.js';
import {
  AgentError,
  DriveError,
  errnoName,
  MachineError,
  MemoryError,
  SnapshotError,
  TsvisorError,
  UsageError,
} from '../errors.js';
import { addon } from '../kvm/addon.js';
import type { MigrateOptions, MigrationResult } from '../migration/options.js';
import type { ReceiveOptions } from '../migration/receive.js';
import { type CheckedState, decodeState, encodeState } from '../snapshot/format.js';
import { OpenSnapshot } from '../snapshot/open.js';
import type { PageSourceConfig, PageSourceThread } from '../snapshot/page-source.js';
import type { Prefetch } from '../snapshot/prefetch.js';
import { portableConfig, type RestoreOptions, restoredConfig } from '../snapshot/restore.js';
import {
  capture,
  type SnapshotInfo,
  type SnapshotOptions,
  type SnapshotSource,
  takeSnapshot,
} from '../snapshot/take.js';
import { checkConfig, type MachineConfig, type ResolvedConfig, resolveConfig } from './config.js';
import { ConsoleTail } from './console-tail.js';
import { withDefaultGuest } from './default-guest.js';
import type { NetworkConfig } from './device-config.js';
import { type DeviceHandle, DeviceHandles } from './device-handle.js';
import type { MachineEnd, MachineStats } from './end.js';
import type { MemoryLayer } from './guest-ram.js';
import type { MachineAgent, ReadyOptions } from './machine-agent.js';
import type { MachineOrigin, MachineState } from './messages.js';
import { RateLimit, WARNINGS_PER_MINUTE } from './rate-limit.js';
import { SharedThread } from './shared-thread.js';
import { ThreadLink } from './thread-link.js';
import { discardWhileUnread } from './unread-stream.js';
import { UserNetworks } from './user-networks.js';
import { keepWarm, warmUp } from './warm-threads.js';

/** Lines of the guest's console that an error carries. */
const ERROR_CONSOLE_LINES = 20;

const DEFAULT_STOP_TIMEOUT = 30_000;
/** Milliseconds between the end of a guest's programs and its own, on a busy host that interprets guests. */
const END_GRACE = 30_000;

/** Host-side hooks of a machine. */
export interface MachineOptions {
  /** Receives the machine thread's log lines; silent by default. */
  readonly onLog?: (level: 'debug' | 'info' | 'warn', message: string) => void;
  /** Ends the machine at once when it aborts; create() then rejects with its reason. */
  readonly signal?: AbortSignal;
  /** Where its devices are, with those of other machines. Default: a thread of its own. */
  readonly thread?: SharedThread;
  /** @internal Path of a Unix socket for its vsock, if it has one and the configuration names none. */
  readonly vsockSocket?: string | undefined;
}

/** How to end a machine. */
export interface StopOptions {
  /** Whether the guest is asked to power off first; default false. */
  readonly graceful?: boolean;
  /** Milliseconds that it has for that, 0 to 2^31 - 1; default 30000. */
  readonly timeout?: number;
}

/** What a machine emits, with the arguments of each event. */
export interface MachineEvents {
  /** It has started, been paused or resumed, or ended. */
  state: [state: MachineState];
  /** The guest reset itself and boots again. */
  reset: [];
  /** The host could not read or write a drive's image; at most ten a minute. */
  driveError: [error: { readonly drive: number; readonly message: string }];
  /** It has ended; wait() tells the same. */
  end: [end: MachineEnd];
}

/** What a machine has done so far. */
export interface MachineMetrics extends MachineStats {
  readonly state: MachineState;
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
export class Machine extends EventEmitter<MachineEvents> implements AsyncDisposable {
  readonly #link = new ThreadLink();
  readonly #serial: Duplex;
  readonly #ports: readonly { readonly name: string; readonly console: boolean; readonly stream: Duplex }[];
  /** Consoles that the program has not asked for. */
  readonly #unread = new Map<Duplex, () => void>();
  readonly #networks: UserNetworks;
  readonly #devices: DeviceHandles;
  readonly #frames = new Map<number, FramePort>();
  readonly #vsock: VsockHost | undefined;
  readonly #agent: MachineAgent | undefined;
  readonly #consoleTail = new ConsoleTail();
  readonly #ended: Promise<MachineEnd>;
  readonly #config: ResolvedConfig;
  /** The configuration, for snapshots. */
  #portable: object = {};
  /** The snapshot since which written pages are noted. */
  #base: { readonly path: string; readonly id: string } | undefined;
  /** The last of what holds the vCPUs. */
  #held: Promise<unknown> = Promise.resolve();
  /** Folders with its private files. */
  readonly #scratch: string[] = [];
  /** Its disks may be another process's. */
  #undecided = false;
  readonly #pageSource: PageSourceThread | undefined;
  #prefetch: Prefetch | undefined;
  #state: MachineState = 'created';
  #removeAbort = () => {};

  private constructor(
    config: ResolvedConfig,
    options: MachineOptions,
    networks: UserNetworks,
    vsock: VsockHost | undefined,
    Agent: typeof MachineAgent | undefined,
    origin: MachineOrigin | undefined,
    source: PageSourceThread | undefined,
    identity: GuestIdentity | undefined,
  ) {
    super();
    this.#config = config;
    if (origin) this.#state = 'paused';
    this.#networks = networks;
    this.#vsock = vsock;
    const link = this.#link;
    this.#devices = new DeviceHandles(config.devices, (request) => link.tell(request));
    const [serial, serialThere] = link.openPair();
    const ports = config.consolePorts.map(() => link.openPair());
    const cables = config.networks.map(({ type }) => (type === 'tap' ? undefined : link.openPair()));
    const vsockPair = vsock && link.openPair();
    this.#pageSource = source;
    if (source) link.own(source.handOver());
    link.start(
      {
        config,
        serial: serialThere,
        consolePorts: ports.map(([, there]) => there),
        networks: cables.map((pair) => pair?.[1]),
        vsock: vsockPair?.[1],
        consoleTail: this.#consoleTail.buffer,
        logs: options.onLog !== undefined,
        origin,
      },
      options.thread,
      (notice) => {
        switch (notice.type) {
          case 'log':
            options.onLog?.(notice.level, notice.message);
            break;
          case 'reset':
            this.emit('reset');
            break;
          case 'drive-error':
            this.emit('driveError', { drive: notice.drive, message: notice.message });
            break;
          case 'device-message':
          case 'device-failed':
            this.#devices.receive(notice);
            break;
        }
      },
    );
    // While its thread makes the machine.
    this.#serial = link.stream(serial);
    this.#ports = config.consolePorts.map(({ name, console }, index) => {
      const [here] = ports[index] as (typeof ports)[0];
      return { name, console, stream: link.stream(here) };
    });
    cables.forEach((pair, index) => {
      if (!pair) return;
      const stream = link.stream(pair[0]);
      if (config.networks[index]?.type === 'user') networks.attach(index, stream);
      else this.#frames.set(index, new FramePort(stream));
    });
    if (vsockPair) vsock?.attach(link.stream(vsockPair[0]));
    this.#agent = vsock && Agent && new Agent(vsock, () => this.#mustRun(), identity);
    const consoles = this.#ports.filter((port) => port.console).map((port) => port.stream);
    for (const stream of [this.#serial, ...consoles]) this.#unread.set(stream, discardWhileUnread(stream));
    this.#ended = link.ended.then(
      (end) => {
        this.#over(this.#whyEnded(end));
        tell(() => this.emit('end', end));
        return end;
      },
      (error: Error) => {
        this.#over(this.#explain(error));
        throw error;
      },
    );
    this.#ended.catch(() => {}); // whoever cares waits
  }

  /**
   * Makes a machine with its kernel loaded, ready to start. Without a `kernel` it is the default guest, which is built
   * first if it is not in the cache: minutes, once, with progress to onLog; `tsvisor kernel build` does so beforehand.
   * @throws UsageError, ImageError, MemoryError, DriveError, NetworkError, DeviceError, KvmError, ERR_BUILD: see their codes.
   */
  static async create(config: MachineConfig = {}, options: MachineOptions = {}): Promise<Machine> {
    const { signal } = options;
    signal?.throwIfAborted();
    checkConfig(config);
    const whole = await withDefaultGuest(config, options.onLog);
    const resolved = resolveConfig(whole);
    const machine = await Machine.#make(resolved, config.networks ?? [], options);
    const { vsock, devices } = resolved;
    machine.#portable = portableConfig({ ...whole, devices, ...(vsock && { vsock: whole.vsock ?? true }) });
    return machine;
  }

  /**
   * A machine that goes on where another was saved by snapshot(), in state `paused`: resume() lets it run. Its memory is
   * mapped from the snapshot, page by page as it is touched, so any number of machines share what they do not write.
   * @param folder the snapshot, which must stay as long as the machine runs.
   * @throws SnapshotError when it is damaged, of another version or host, or refers to what is not there any more; and as
   * create().
   */
  static async restore(folder: string, options: RestoreOptions & MachineOptions = {}): Promise<Machine> {
    const { onLog, signal, thread, vsockSocket, ...rest } = options;
    signal?.throwIfAborted();
    if (thread && rest.pages) throw new UsageError('thread: a machine with pages has a thread of its own');
    if (rest.verify && rest.pages) throw new UsageError('verify: with pages there is no memory file to be verified');
    await using snapshot = await OpenSnapshot.open(folder, rest.pages ? 'state' : 'files');
    if (rest.verify) await snapshot.verify();
    const machine = await Machine.#resurrect(snapshot.state, snapshot.layers, snapshot.path, rest, {
      ...(onLog && { onLog }),
      ...(signal && { signal }),
      ...(thread && { thread }),
      vsockSocket,
    });
    if (rest.prefetch) machine.#prefetch = snapshot.prefetch();
    if (rest.track) machine.#base = { path: snapshot.path, id: snapshot.state.id };
    return machine;
  }

  /**
   * Keeps so many threads ready for machines to come, each some 15 MiB: to start one and load its code is most of the time
   * that create() and restore() take otherwise. Each has a VM with as much memory as the machine before had, up to 1 GiB,
   * or as much as is the default; a machine of another size takes a little longer. They do not keep the process from ending.
   *
   * One more is the thread of a machine that has ended: it waits for the next one, which is there soonest, also where this
   * was never called. After keepWarm(0) no thread waits: each ends with its machine. Threads that have run devices of users,
   * or whose machine failed, have no other.
   * @param count 0 to 64. @throws UsageError
   */
  static keepWarm(count: number): void {
    keepWarm(count);
  }

  /**
   * Waits at an address for a machine that another process moves here by migrate(), and takes it: resolves once it runs
   * here (or is paused, as it was there). One migration is awaited; a visitor with another key ends that.
   * @param address `tcp:HOST:PORT`, where a port of 0 is chosen by the host, or `unix:PATH`, which is made.
   * @param options `drives` are for those that are not at the same path, or not the same files, here: they must have the
   * contents that the guest left behind. The rest is as for restore().
   * @throws MigrationError; then the machine goes on where it was. UsageError, or the signal's reason.
   */
  static async receive(
    address: string,
    options: ReceiveOptions & Omit<RestoreOptions, 'track' | 'verify' | 'prefetch' | 'pages'> & MachineOptions,
  ): Promise<Machine> {
    const { key, timeout, onProgress, onListening, onLog, signal, thread, vsockSocket, ...rest } = options;
    const { receiveMachine, ownFolders } = await import('../migration/receive.js');
    const machineOptions = {
      ...(onLog && { onLog }),
      ...(signal && { signal }),
      ...(thread && { thread }),
      vsockSocket,
    };
    let own: readonly string[] = [];
    const machine = await receiveMachine(address, {
      key,
      signal,
      drives: rest.drives ?? [],
      ...(timeout !== undefined && { timeout }),
      ...(onProgress && { onProgress }),
      ...(onListening && { onListening }),
      prepare: async (state, drives) => {
        warmUp();
        const { config } = await restoredConfig(state, '', { ...rest, drives });
        await loadCode(config);
        own = ownFolders(state.disks);
      },
      build: (state, drives, layer) =>
        Machine.#resurrect(state, [layer], '', { ...rest, drives }, machineOptions, true),
    });
    machine.#scratch.push(...own);
    return machine;
  }

  static async #resurrect(
    state: CheckedState,
    layers: readonly MemoryLayer[],
    folder: string,
    options: RestoreOptions,
    machineOptions: MachineOptions,
    moved = false,
  ): Promise<Machine> {
    const { config, networks, identity, portable, scratch } = await restoredConfig(state, folder, options);
    const { pages, prefetch = false, track = false } = options;
    let machine: Machine | undefined;
    let source: PageSourceThread | undefined;
    try {
      source = pages && (await openPageSource(pages, config.memory, prefetch));
      const origin = { layers, pages: source?.link, machine: state.machine, track, moved };
      machine = await Machine.#make(config, networks, machineOptions, origin, source, identity);
      machine.#portable = portable;
      return machine;
    } finally {
      if (!machine) await source?.close();
      if (scratch !== undefined && machine) machine.#scratch.push(scratch);
      else if (scratch !== undefined) await removeFolder(scratch);
    }
  }

  static async #make(
    resolved: ResolvedConfig,
    networkConfigs: readonly NetworkConfig[],
    options: MachineOptions,
    origin?: MachineOrigin,
    source?: PageSourceThread,
    identity?: GuestIdentity,
  ): Promise<Machine> {
    const { signal, thread } = options;
    if (thread !== undefined && !(thread instanceof SharedThread)) throw new UsageError('thread: not a SharedThread');
    const networks = await UserNetworks.open(networkConfigs);
    let machine: Machine | undefined;
    let vsock: VsockHost | undefined;
    try {
      vsock = await openVsock(resolved, options);
      const agent = resolved.agent ? (await import('./machine-agent.js')).MachineAgent : undefined;
      machine = new Machine(resolved, options, networks, vsock, agent, origin, source, identity);
      machine.#endOnAbort(signal);
      machine.#devices.place(await machine.#link.ready);
      signal?.throwIfAborted();
      return machine;
    } catch (error) {
      await machine?.close();
      await networks.close();
      vsock?.close(error as Error);
      signal?.throwIfAborted();
      throw error;
    }
  }

  /** @internal What it is made of, every default filled in. */
  get config(): ResolvedConfig {
    return this.#config;
  }

  /** @internal Folders of files that go with it. */
  get scratch(): readonly string[] {
    return this.#scratch;
  }

  /** What it is doing now. */
  get state(): MachineState {
    return this.#state;
  }

  /**
   * ttyS0: what the guest prints is read, what is written the guest reads; both with back-pressure. Until the program has
   * asked for it, only the last output is kept, so that a guest that nobody watches does not wait for a reader.
   */
  get serial(): Duplex {
    return this.#take(this.#serial);
  }

  /** Ports of this host that lead to the guest, as they really are: a `hostPort` of 0 was chosen by the host. */
  get hostForwards(): readonly HostForward[] {
    return this.#networks.hostForwards;
  }

  /** Sockets between host and guest. @throws UsageError when the configuration has no `vsock`. */
  get vsock(): Vsock {
    if (this.#vsock) return this.#vsock;
    throw new UsageError('this machine has no vsock; make it with vsock: true');
  }

  /**
   * Resolves when the guest can be asked: its agent has said that it is there. exec(), spawn() and fs wait for that
   * themselves, for as long as the default says.
   * @throws AgentError ERR_AGENT_TIMEOUT, the error of the machine's end, UsageError without an agent, or the signal's
   * reason.
   */
  async ready(options: ReadyOptions = {}): Promise<void> {
    await this.#ask((agent) => {
      this.#mustRun();
      return agent.ready(options);
    });
  }

  /**
   * Runs a command in the guest to its end and collects its output. That it fails is a result, not an error.
   *
   * ```js
   * const { code, stdout } = await machine.exec('ls -l | wc -l');
   * await machine.exec('sort', { args: ['-n'], stdin: '3\n1\n2\n', user: 'nobody', timeout: 5000 });
   * ```
   * @param command a command line for the guest's /bin/sh; with `args`, a program that is run without a shell.
   * @throws GuestError ERR_EXEC when it cannot be started, TsvisorError ERR_TIMEOUT, AgentError, the error of the
   * machine's end, UsageError, or the signal's reason.
   */
  exec(command: string, options: ExecOptions & { readonly encoding: 'buffer' }): Promise<ExecResult<Buffer>>;
  exec(command: string, options?: ExecOptions & { readonly encoding?: 'utf8' }): Promise<ExecResult>;
  exec(command: string, options: ExecOptions = {}): Promise<ExecResult<string | Buffer>> {
    return this.#ask(({ agent }) => agent.exec(command, options));
  }

  /** Starts a command in the guest, whose streams the program reads and writes. @throws as exec(). */
  spawn(command: string, options: SpawnOptions = {}): Promise<GuestProcess> {
    return this.#ask(({ agent }) => agent.spawn(command, options));
  }

  /** The guest's files. @throws UsageError when the guest has no agent. */
  get fs(): GuestFileSystem {
    return this.#needAgent().agent.fs;
  }

  /** Sets the guest's clock to the host's, as after a long pause. @throws as exec(). */
  syncTime(): Promise<void> {
    return this.#ask(({ agent }) => agent.syncTime());
  }

  /** Runs the guest from its entry point. @throws TsvisorError ERR_MACHINE_STATE when it was started before. */
  async start(): Promise<void> {
    this.#mustBe('created', 'start');
    await this.#link.request({ command: 'start' });
    this.#setState('running');
  }

  /** Stops the vCPU where it is; devices too. Resolves when it has stopped. @throws TsvisorError ERR_MACHINE_STATE */
  async pause(): Promise<void> {
    this.#mustBe('running', 'pause');
    await this.#link.request({ command: 'pause' });
    this.#setState('paused');
  }

  /**
   * Goes on after pause(), or where a snapshot was taken: its agent, if it has one, then first seeds the guest's random
   * numbers anew and sets its clock, host name and MAC addresses. ready(), exec() and what is like them wait for that.
   * @throws TsvisorError ERR_MACHINE_STATE when it is not paused.
   */
  async resume(): Promise<void> {
    this.#mustBe('paused', 'resume');
    if (this.#undecided) await this.#link.request({ command: 'release' });
    this.#undecided = false;
    await this.#link.request({ command: 'resume' });
    this.#prefetch?.start();
    this.#setState('running');
    void this.#agent?.resumed();
  }

  /**
   * Ends the machine: at once, as if its power were cut, or gracefully, by asking the guest to power off and cutting the
   * power when it has not within `timeout`. No effect on one that has ended.
   * @returns how it ended: `guest-shutdown` when the guest did as it was asked, `stopped` otherwise.
   * @throws UsageError for a graceful stop of a guest without an agent.
   */
  async stop({ graceful = false, timeout = DEFAULT_STOP_TIMEOUT }: StopOptions = {}): Promise<MachineEnd> {
    if (!(timeout >= 0 && timeout < 2 ** 31)) throw new UsageError(`timeout: ${timeout} is not 0 to 2^31 - 1 ms`);
    if (graceful) await this.#powerOff(timeout);
    // The guest may end between the check and the request: then wait() tells how.
    if (!this.#link.over) await this.#link.request({ command: 'stop' }).catch(() => {});
    return this.wait();
  }

  /**
   * Saves the machine, running or paused, to a folder from which restore() makes machines: all of its memory, vCPU and
   * devices. The guest stands still meanwhile. Connections of it to the outside are not part of it.
   * @param folder is made; complete, or not at all.
   * @throws SnapshotError when it cannot be written; ERR_MACHINE_STATE when the machine has ended.
   */
  async snapshot(folder: string, options: SnapshotOptions = {}): Promise<SnapshotInfo> {
    const info = await this.#oneByOne(async () => {
      const info = await takeSnapshot(this.#source, folder, options);
      if (options.track || options.differential) this.#base = info;
      return info;
    });
    if (options.stop) await this.stop();
    return info;
  }

  /**
   * Another machine that goes on from where this one is now, in state `paused`, with memory and disks of its own; this one
   * goes on too. Like snapshot() and restore(), by way of memory instead of files. For many of one kind take a snapshot:
   * its clones share what they do not write.
   * @throws as snapshot() and restore().
   */
  async fork(options: Omit<RestoreOptions, 'verify' | 'prefetch' | 'pages'> & MachineOptions = {}): Promise<Machine> {
    const { onLog, signal, thread, ...rest } = options;
    const fd = addon.memfdCreate('tsvisor-fork', this.#config.memory);
    if (fd < 0) throw new MemoryError(`fork: the host has no memory for it (${errnoName(-fd)})`);
    const disks = await mkdtemp(join(tmpdir(), 'tsvisor-fork-'));
    let fork: Machine | undefined;
    try {
      const { state } = await this.#oneByOne(() => capture(this.#source, fd, disks, disks, {}));
      const layers = [{ fd, extents: undefined }];
      const checked = decodeState(encodeState(state), 'fork');
      fork = await Machine.#resurrect(checked, layers, disks, rest, {
        ...(onLog && { onLog }),
        ...(signal && { signal }),
        ...(thread && { thread }),
      });
      fork.#scratch.push(disks);
      return fork;
    } finally {
      addon.close(fd);
      if (!fork) await removeFolder(disks);
    }
  }

  /**
   * Moves the machine, running or paused, to a process that waits for it by receive(), while the guest runs on: it stands
   * still only for the last part of its memory. When this resolves the machine has ended here, with reason `migrated`,
   * and runs there. Connections of the guest to the outside by the host's vsock or a user-mode network are reset.
   * @param address of the other process: `tcp:HOST:PORT` or `unix:PATH`.
   * @throws MigrationError when it could not be moved; it then goes on here as before, unless the message says that this
   * cannot be known: then it is `paused`. ERR_MACHINE_STATE when it has ended or was never started; UsageError; the
   * signal's reason.
   */
  async migrate(address: string, options: MigrateOptions): Promise<MigrationResult> {
    if (this.#state === 'created') this.#mustBe('running', 'migrate');
    const { migrateMachine } = await import('../migration/send.js');
    return this.#oneByOne(async () => {
      this.#base = undefined; // it takes the notes of written pages for itself
      const undecided = () => {
        this.#undecided = true;
        this.#setState('paused');
      };
      const leaveFiles = () => {
        this.#scratch.length = 0;
      };
      const source = { link: this.#link, config: this.#config, portable: this.#portable, undecided, leaveFiles };
      const result = await migrateMachine(source, address, options);
      await this.wait();
      return result;
    });
  }

  get #source(): SnapshotSource {
    const saving = () => {
      this.#base = undefined;
    };
    return { link: this.#link, config: this.#config, portable: this.#portable, base: this.#base, saving };
  }

  /**
   * The host's end of a console port: what the guest sends is read, what is written the guest gets; both with
   * back-pressure. Once it is destroyed, the guest's output is discarded. A console is like `serial`; what a plain port
   * sends waits for the program to read it.
   * @param name as in the configuration's `consolePorts`. @throws UsageError if there is none of that name.
   */
  port(name: string): Duplex {
    return this.#take(this.#portNamed(name).stream);
  }

  /**
   * A device of the configuration's `devices`: where the guest finds it, and the messages to and from it.
   * @throws UsageError if there is none of that name.
   */
  device(name: string): DeviceHandle {
    return this.#devices.get(name);
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
    await this.#link.request({
      command: 'resize',
      resize: { port: this.#ports.indexOf(entry), size: { rows, columns } },
    });
  }

  /**
   * The other end of the cable of a network card of type `frames`: an object stream of Ethernet frames (Uint8Array).
   * @param index in the configuration's `networks`. @throws UsageError if that is none of that type.
   */
  frames(index = 0): Duplex {
    const port = this.#frames.get(index);
    if (!port) throw new UsageError(`networks[${index}] is not of type frames`);
    return port;
  }

  /** Counters and times; also of a machine that has ended. */
  async metrics(): Promise<MachineMetrics> {
    const link = this.#link;
    const asked = link.final ? undefined : link.request({ command: 'query' });
    const answer = await asked?.catch((error) => {
      if (!link.final) throw error; // otherwise it ended before it could answer
    });
    if (answer?.stats) return { state: answer.state, ...answer.stats };
    return { state: 'ended', ...(link.final as NonNullable<typeof link.final>).stats };
  }

  /**
   * The last lines that the guest wrote to its console: ttyS0, or hvc0 where there is no ttyS0. They are kept whoever
   * reads the streams, and after the end. Control characters are left out; the rest is as the guest chose it.
   * @param lines 1 or more; the last 16 KiB are kept.
   */
  consoleTail(lines = ERROR_CONSOLE_LINES): string {
    return this.#consoleTail.lines(lines).join('\n');
  }

  /**
   * Resolves when the machine has ended, however the guest ended it.
   * @throws TsvisorError when tsvisor itself failed, ERR_MACHINE_CRASHED when the machine thread died.
   */
  wait(): Promise<MachineEnd> {
    return this.#ended;
  }

  /** Ends the machine if it runs and releases all it held: thread, descriptors, memory. */
  async close(): Promise<void> {
    this.#removeAbort();
    await this.#link.close();
    await this.#pageSource?.close();
    await this.#prefetch?.close();
    await this.#networks.close();
    await this.#ended.catch(() => {});
    await Promise.all(this.#scratch.splice(0).map(removeFolder));
  }

  /** close(), for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #powerOff(timeout: number): Promise<void> {
    const { agent } = this.#needAgent();
    if (this.#link.over || this.#state !== 'running') return; // what does not run cannot be asked
    const late = AbortSignal.timeout(timeout);
    const tooLate = new Promise<void>((resolve) => late.addEventListener('abort', () => resolve()));
    const done = agent.shutdown('poweroff', { signal: late }).then(() => this.wait());
    await Promise.race([done.catch(() => {}), tooLate]);
  }

  /** For what holds the vCPUs: the next begins when that before it is done. */
  #oneByOne<T>(action: () => Promise<T>): Promise<T> {
    const result = this.#held.then(async () => {
      if (this.#pageSource) await this.#link.request({ command: 'fetch' }); // while the guest runs
      return action();
    });
    this.#held = result.catch(() => {});
    return result;
  }

  #needAgent(): MachineAgent {
    if (this.#agent) return this.#agent;
    throw new UsageError('this machine’s guest has no agent; make it with agent: true');
  }

  /** @throws TsvisorError where it is no use to wait for the guest. */
  #mustRun(): void {
    if (this.#state !== 'created') return;
    throw new TsvisorError('ERR_MACHINE_STATE', 'the machine has not been started; call start() first');
  }

  /** @throws TsvisorError; that the machine has ended, request() tells. */
  #mustBe(state: MachineState, command: string): void {
    if (this.#state === state || this.#state === 'ended') return;
    throw new TsvisorError('ERR_MACHINE_STATE', `the machine is ${this.#state}, not ${state}: it cannot ${command}`);
  }

  /** Asks the guest; what fails is told with what the guest said last. */
  async #ask<T>(question: (agent: MachineAgent) => Promise<T>): Promise<T> {
    const agent = this.#needAgent();
    try {
      return await question(agent);
    } catch (error) {
      if (!(error instanceof AgentError)) throw error;
      if (error.code === 'ERR_AGENT') await this.#awaitEnd(agent);
      throw this.#explain(error);
    }
  }

  /** An agent that is lost may be the first sign of a guest that powers off. @throws why the machine has ended, if it has. */
  async #awaitEnd(agent: MachineAgent): Promise<void> {
    const late = AbortSignal.timeout(END_GRACE);
    const tooLate = new Promise<void>((resolve) => late.addEventListener('abort', () => resolve()));
    // Of an agent that is being killed the command's connection may go first: only one that answers is there.
    const answers = agent.ready({ signal: late }).then(
      () => agent.agent.ping({ signal: late }).catch(() => tooLate),
      (error) => (error instanceof AgentError ? undefined : tooLate), // one that is there, and of no use
    );
    const end = await Promise.race([this.wait(), answers, tooLate]);
    if (end) throw this.#whyEnded(end);
  }

  #endOnAbort(signal: AbortSignal | undefined): void {
    if (!signal) return;
    const onAbort = () => void (this.#link.building ? this.close() : this.stop()).catch(() => {});
    signal.addEventListener('abort', onAbort, { once: true });
    this.#removeAbort = () => signal.removeEventListener('abort', onAbort);
  }

  /** @param error for those who were doing something in the machine. */
  #over(error: Error): void {
    this.#removeAbort();
    void this.#networks.close();
    this.#agent?.close(error);
    this.#vsock?.close(error);
    this.#devices.close();
    void this.#prefetch?.close();
    this.#setState('ended');
  }

  #whyEnded({ reason, message }: MachineEnd): TsvisorError {
    if (reason === 'page-source-failure') return this.#explain(new SnapshotError(`snapshot: ${message}`));
    if (reason === 'drive-failure') return this.#explain(new DriveError(message));
    if (reason === 'guest-panic') return this.#explain(new MachineError('ERR_GUEST_PANIC', message));
    return this.#explain(new MachineError('ERR_MACHINE_ENDED', `the machine has ended: ${message}`));
  }

  /** Adds what the guest said last. */
  #explain<E extends Error>(error: E): E {
    if (error instanceof TsvisorError) error.console = this.consoleTail();
    return error;
  }

  #setState(state: MachineState): void {
    if (this.#state === state || this.#state === 'ended') return;
    this.#state = state;
    tell(() => this.emit('state', state));
  }

  #take(stream: Duplex): Duplex {
    this.#unread.get(stream)?.();
    this.#unread.delete(stream);
    return stream;
  }

  #portNamed(name: string) {
    const port = this.#ports.find((port) => port.name === name);
    if (port) return port;
    const names = this.#ports.map((port) => port.name).join(', ');
    throw new UsageError(`there is no console port '${name}'; this machine has ${names || 'none'}`);
  }
}

async function removeFolder(path: string): Promise<void> {
  await rm(path, { recursive: true, force: true });
}

/** Calls listeners. What they throw is theirs: it does not make an operation of the machine fail, and is not lost. */
function tell(emit: () => void): void {
  try {
    emit();
  } catch (error) {
    process.nextTick(() => {
      throw error;
    });
  }
}

/** Loads what a machine of that configuration needs: not only when its guest stands still. */
async function loadCode({ networks, vsock, agent }: ResolvedConfig): Promise<void> {
  if (networks.some(({ type }) => type === 'user')) await import('../backends/user-network/user-network.js');
  if (vsock) await import('../backends/vsock/vsock-host.js');
  if (agent) await import('./machine-agent.js');
}

/** The host's side of the configuration's vsock. Loaded only where there is one. */
async function openVsock(
  { vsock }: ResolvedConfig,
  { onLog, vsockSocket }: MachineOptions,
): Promise<VsockHost | undefined> {
  if (!vsock) return undefined;
  const { VsockHost } = await import('../backends/vsock/vsock-host.js');
  const limit = new RateLimit(WARNINGS_PER_MINUTE);
  const { cid, socket = vsockSocket } = vsock;
  return VsockHost.open({ cid, socket, warn: (message) => onLog && limit.take() && onLog('warn', message) });
}

/** Who gives a restored machine its memory. Loaded only where there is one. */
async function openPageSource(pages: PageSourceConfig, size: number, prefetch: boolean): Promise<PageSourceThread> {
  const { PageSourceThread } = await import('../snapshot/page-source.js');
  return PageSourceThread.open(pages, size, prefetch);
}
