import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { GuestIdentity } from '../agent/agent.js';
import { SnapshotError, UsageError } from '../errors.js';
import { type ResolvedConfig, resolveConfig } from '../machine/config.js';
import type { ConfigWithImages } from '../machine/default-guest.js';
import type { DeviceModule, DriveConfig, NetworkConfig, VsockConfig } from '../machine/device-config.js';
import { checkFields, checkList, type FieldsOf } from '../machine/fields.js';
import { StateReader } from '../state-reader.js';
import { type DriveOverride, restoreDisks } from './disks.js';
import { isUnchanged } from './file-reference.js';
import type { CheckedState, DiskCapture } from './format.js';
import type { PageSourceConfig } from './page-source.js';

/**
 * What a machine gets that goes on from a snapshot. A snapshot may be anybody's: of what it names on this host, only
 * files are opened that are still exactly what they were; taps, ports, sockets and modules are to be given again.
 */
export interface RestoreOptions {
  /** By drive: files in place of those that the snapshot refers to, and where the guest's writes go. */
  readonly drives?: readonly (DriveOverride | undefined)[];
  /**
   * As many as the machine had, of the same types. Default: user-mode networks without host forwards.
   * A `mac` that is given the guest gets by its agent: that of networks[0] for eth0, and so on.
   */
  readonly networks?: readonly NetworkConfig[];
  /** Another address of the guest's, and a Unix socket. */
  readonly vsock?: VsockConfig;
  /** The modules of the machine's own devices, as many as it had: they are code, and code is not in a snapshot. */
  readonly devices?: readonly DeviceModule[];
  /** The guest's host name, by its agent: as gethostname() tells it, 1 to 64 letters, digits, dots and hyphens. */
  readonly hostname?: string;
  /** Whether to note what is written from now on, for a differential snapshot. Default false. */
  readonly track?: boolean;
  /**
   * Whether the memory is read whole first and compared with the snapshot's checksums. Default false: nothing of it is
   * read before it is touched, and what is damaged in it the guest finds.
   */
  readonly verify?: boolean;
  /**
   * Whether, once the machine runs, its memory is brought in from the disk in the background, so that it does not wait
   * for each page that it touches. With `pages`, whether the source is asked for all of it. Default false.
   */
  readonly prefetch?: boolean;
  /**
   * Who gives the memory as it is touched, in place of the snapshot's memory files, which need not be there: all of RAM as
   * it was in this snapshot, also when that is differential. A failure of it ends the machine, whose wait() resolves with
   * `page-source-failure`. snapshot() of such a machine first fetches what is still missing.
   */
  readonly pages?: PageSourceConfig;
}

const FIELDS: FieldsOf<RestoreOptions> = {
  drives: true,
  networks: true,
  vsock: true,
  devices: true,
  hostname: true,
  track: true,
  verify: true,
  prefetch: true,
  pages: true,
};
const HOSTNAME = /^[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?$/;
const DRIVE: FieldsOf<DriveOverride> = { file: true, overlay: true };

/** A configuration for a machine that goes on from a snapshot. */
export interface RestoredConfig {
  readonly config: ResolvedConfig;
  readonly networks: readonly NetworkConfig[];
  readonly identity: GuestIdentity;
  /** The configuration, for the next snapshot. */
  readonly portable: object;
  /** A folder that goes with the machine. */
  readonly scratch: string | undefined;
}

/** In place of a kernel of which nothing is known. */
const NO_KERNEL = '(unknown)';
/** Characters of a device's name. */
const MAX_NAME = 64;
const MAX_DEVICES = 64;
/**
 * Which fields of a saved configuration are taken as they are: those that lead to nothing of the host whatever they say,
 * and that resolveConfig() checks.
 */
const AS_SAVED: Readonly<Record<keyof ConfigWithImages, boolean>> = {
  append: true,
  cpus: true,
  vcpuThreads: true,
  onReset: true,
  serial: true,
  console: true,
  agent: true,
  defaultInit: true,
  terminal: true,
  consolePorts: true,
  rng: true,
  acpi: true,
  kernel: false,
  initrd: false,
  agentProgram: false,
  memory: false,
  drives: false,
  networks: false,
  vsock: false,
  devices: false,
};

/** @param folder of the snapshot. @throws SnapshotError, UsageError that names the option. */
export async function restoredConfig(
  state: Pick<CheckedState, 'config' | 'boot' | 'disks' | 'memory'>,
  folder: string,
  options: RestoreOptions,
): Promise<RestoredConfig> {
  checkFields(options, 'options', FIELDS);
  const overrides = options.drives ?? [];
  checkList(overrides, 'drives');
  overrides.forEach(checkOverride);
  const saved = new StateReader(state.config, 'config');
  const networks = restoredNetworks(saved, options.networks);
  const devices = restoredDevices(saved, options.devices);
  const vsock = restoredVsock(saved, options.vsock);
  if (overrides.length > state.disks.length) sameLength('drives', overrides, state.disks);
  const { boot } = state;
  const whole: ConfigWithImages = {
    ...Object.fromEntries(
      Object.entries(AS_SAVED).flatMap(([name, as]) => (as && saved.has(name) ? [[name, saved.raw(name)]] : [])),
    ),
    kernel: boot?.kernel.path ?? NO_KERNEL,
    ...(boot?.initrd && { initrd: boot.initrd.path }),
    ...(boot?.agentProgram && { agentProgram: boot.agentProgram.path }),
    memory: state.memory.size,
    drives: savedDrives(saved, state.disks),
    networks,
    devices,
    ...(vsock && { vsock }),
  };
  let resolved: ResolvedConfig;
  try {
    resolved = resolveConfig(whole);
  } catch (cause) {
    const { message } = cause as Error;
    const given = (['networks', 'devices', 'vsock'] as const).some((name) => options[name] && message.startsWith(name));
    if (given) throw cause;
    throw new SnapshotError(`snapshot: its configuration: ${message}`, { cause });
  }
  const identity = identityOf(resolved, options);
  let scratch: string | undefined;
  try {
    const places = await restoreDisks(state.disks, folder, overrides, async () => {
      scratch ??= await mkdtemp(join(tmpdir(), 'tsvisor-'));
      return scratch;
    });
    const drives = resolved.drives.map((drive, index) => ({ ...drive, ...places[index] }));
    // A reset would boot whatever is there now.
    const bootable = boot !== undefined && Object.values(boot).every((file) => file === undefined || isUnchanged(file));
    const onReset = bootable ? resolved.onReset : 'end';
    return { config: { ...resolved, drives, onReset }, networks, identity, portable: portableConfig(whole), scratch };
  } catch (error) {
    if (scratch !== undefined) await rm(scratch, { recursive: true, force: true });
    throw error;
  }
}

function identityOf({ agent }: ResolvedConfig, { hostname, networks = [] }: RestoreOptions): GuestIdentity {
  if (hostname !== undefined) {
    if (typeof hostname !== 'string' || !HOSTNAME.test(hostname)) {
      throw new UsageError(`hostname: '${hostname}' is not 1 to 64 letters, digits, dots and hyphens`);
    }
    if (!agent) throw new UsageError('hostname: the guest has no agent to set it; make the machine with agent: true');
  }
  const macs = networks.flatMap(({ mac }, index) => (mac === undefined ? [] : [[index, mac] as const]));
  return { hostname, macs: new Map(macs) };
}

/** A configuration as JSON can hold it: what only a program or this host can give, and paths, are left out. */
export function portableConfig(config: ConfigWithImages): object {
  const { vsock, networks = [], devices = [], drives = [], kernel, initrd, agentProgram, memory, ...rest } = config;
  const cid = typeof vsock === 'object' ? vsock.cid : undefined;
  return {
    ...rest,
    ...(vsock && { vsock: { ...(cid !== undefined && { cid }) } }),
    drives: drives.map(({ file, overlay, ...drive }) => drive),
    networks: networks.map((network) => {
      const filtered = network.type === 'user' && network.allow !== undefined;
      return { type: network.type, ...(network.mac && { mac: network.mac }), ...(filtered && { filtered }) };
    }),
    devices: devices.map(({ name }) => ({ ...(name && { name }) })),
  };
}

interface SavedNetwork {
  readonly type: NetworkConfig['type'];
  readonly mac?: string;
  /** What it may connect to was asked of the program. */
  readonly filtered: boolean;
}

function restoredNetworks(saved: StateReader, given: readonly NetworkConfig[] | undefined): readonly NetworkConfig[] {
  const before = optionalList(saved, 'networks').map(readNetwork);
  const networks = given ?? before.map(mayBeRestored);
  checkList(networks, 'networks');
  sameLength('networks', networks, before);
  networks.forEach((network, index) => {
    // What the guest negotiated with one kind of network another may not offer.
    const type = before[index]?.type;
    if (network?.type !== type) throw new UsageError(`networks[${index}].type: the machine had ${type} there`);
  });
  return networks;
}

function readNetwork(network: StateReader): SavedNetwork {
  const type = network.text('type', 8);
  if (type !== 'tap' && type !== 'user' && type !== 'frames') network.refuse('type', 'is no type of network');
  const mac = network.has('mac') ? network.text('mac', 17) : undefined;
  return { type, ...(mac && { mac }), filtered: network.has('filtered') };
}

function mayBeRestored({ type, mac, filtered }: SavedNetwork, index: number): NetworkConfig {
  if (type !== 'tap' && !filtered) return { type, ...(mac && { mac }) };
  const what = filtered ? 'a filter, which only a program can have' : 'a tap of the host';
  throw new SnapshotError(`snapshot: networks[${index}] has ${what}; give networks again`);
}

function restoredDevices(saved: StateReader, given: readonly DeviceModule[] | undefined): readonly DeviceModule[] {
  const before = optionalList(saved, 'devices');
  if (given === undefined && before.length > 0) {
    throw new SnapshotError('snapshot: the machine has devices of its own; give their modules again as devices');
  }
  const devices = given ?? [];
  checkList(devices, 'devices');
  sameLength('devices', devices, before);
  return devices.map((device, index) => withSavedName(device, before[index] as StateReader, index));
}

/** A device's state is found by its name. */
function withSavedName(device: DeviceModule, saved: StateReader, index: number): DeviceModule {
  if (!saved.has('name') || typeof device !== 'object' || device === null) return device; // checkFields() tells
  const before = saved.text('name', MAX_NAME);
  const { name = before } = device;
  if (name !== before) throw new UsageError(`devices[${index}].name: the machine had '${before}' there`);
  return { ...device, name };
}

function restoredVsock(saved: StateReader, given: VsockConfig | undefined): VsockConfig | undefined {
  if (given !== undefined) checkFields(given, 'vsock', { cid: true, socket: true });
  if (!saved.has('vsock')) {
    if (given !== undefined && saved.raw('agent') !== true) throw new UsageError('vsock: the machine had none');
    return given; // the agent brings one
  }
  const before = saved.object('vsock');
  return { ...(before.has('cid') && { cid: before.number('cid', 0, 2 ** 32 - 1) }), ...given };
}

/** Drives without the files, which are in the captures. */
function savedDrives(saved: StateReader, captures: readonly DiskCapture[]): DriveConfig[] {
  const drives = optionalList(saved, 'drives');
  if (drives.length !== captures.length) saved.refuse('drives', `are not ${captures.length}`);
  return drives.map((drive, index) => {
    const capture = captures[index] as DiskCapture;
    if (
      drive.has('readOnly') &&
      drive.boolean('readOnly') &&
      (capture.kind !== 'reference' || capture.files.length > 1)
    ) {
      drive.refuse('readOnly', 'does not go with an overlay');
    }
    const fields = ['readOnly', 'cache', 'id', 'onError'].flatMap((name) =>
      drive.has(name) ? [[name, drive.raw(name)]] : [],
    );
    return { ...Object.fromEntries(fields), file: '-' } as DriveConfig;
  });
}

function checkOverride(drive: DriveOverride | undefined, index: number): void {
  if (drive === undefined) return;
  checkFields(drive, `drives[${index}]`, DRIVE);
  for (const [name, path] of Object.entries(drive)) {
    if (path === undefined || (typeof path === 'string' && path !== '' && !path.includes('\0'))) continue;
    throw new UsageError(`drives[${index}].${name}: must be a path`);
  }
}

function optionalList(saved: StateReader, name: string): StateReader[] {
  return saved.has(name) ? saved.list(name, MAX_DEVICES) : [];
}

function sameLength(name: string, now: readonly unknown[], before: readonly unknown[]): void {
  if (now.length === before.length) return;
  throw new UsageError(`${name}: ${now.length} are given, but the machine had ${before.length}`);
}
