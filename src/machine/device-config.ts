import { parse } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import type { Flow } from '../backends/user-network/flow.js';
import type { HostForward } from '../backends/user-network/host-forward.js';
import { UsageError } from '../errors.js';
import { checkFields, checkList, type FieldsOf } from './fields.js';
import { MAX_VIRTIO_DEVICES } from './layout.js';

/** A virtio-blk drive. */
export interface DriveConfig {
  /** Path of a raw image, or of a block device. Its size is a multiple of 512 bytes. */
  readonly file: string;
  /** The guest may not write; the file is opened for reading only. Default false. */
  readonly readOnly?: boolean;
  /**
   * `writeback` (default): through the host's page cache, a guest's flush makes it durable. `none`: past the page cache
   * (O_DIRECT). `unsafe`: as writeback, but flushes are ignored: for images that are thrown away.
   */
  readonly cache?: 'writeback' | 'none' | 'unsafe';
  /** Serial number that the guest sees, at most 20 bytes; default the drive's index. */
  readonly id?: string;
  /** Path of a file for the guest's writes; `file` is then only read and may be shared. Made if it is missing. */
  readonly overlay?: string;
  /**
   * What happens when the host cannot read or write the image: the guest gets an I/O error (`report`, default), or the
   * machine ends with `drive-failure`. Either way there is a `driveError` event.
   */
  readonly onError?: 'report' | 'end';
}

/** A virtio-net device: a tap of the host, the user-mode network, or frames that the program itself carries. */
export type NetworkConfig = (
  | {
      readonly type: 'tap';
      /** Name of the tap; made if it is missing and this process may. */
      readonly name: string;
    }
  | {
      readonly type: 'user';
      /** Ports of the host that lead to the guest. */
      readonly hostForwards?: readonly HostForward[];
      /** Asked for each new TCP connection, UDP flow and DNS question of the guest; false refuses it. */
      readonly allow?: (flow: Flow) => boolean | Promise<boolean>;
    }
  | {
      /** `machine.frames(index)` is the other end of the cable. */
      readonly type: 'frames';
    }
) & {
  /** MAC address, `52:54:00:12:34:56`; default one of its own for each device of the machine. */
  readonly mac?: string;
};

/** A byte stream between host and guest: a port of the machine's virtio console. */
export interface ConsolePortConfig {
  /** The guest finds it as /dev/virtio-ports/NAME, or for a console as hvc0 and so on in order. */
  readonly name: string;
  /** Whether the guest takes it for a terminal (hvc) or for a plain port. Default false. */
  readonly console?: boolean;
}

/** Names of the machine's own devices in its metrics. */
const OWN_NAMES = /^(blk\d+|net\d+|console|rng|vsock)$/;

/** A device of one's own: a class that extends VirtioDevice or MmioDevice of `tsvisor/device`; see docs/devices.md. */
export interface DeviceModule {
  /**
   * Path of the module, from the current directory, or its file: URL, as `new URL('./dice.js', import.meta.url)`. It is
   * imported on the machine thread: JavaScript that Node.js can load by itself.
   */
  readonly module: string | URL;
  /** Name of the module's export that is the class; default `default`. */
  readonly export?: string;
  /** For `machine.device(name)`, each once: letters, digits and ._-, at most 64; default the module's, as `dice`. */
  readonly name?: string;
  /** What the device has as `this.options`; by structured clone. */
  readonly options?: unknown;
}

export interface ResolvedDevice {
  readonly name: string;
  /** URL. */
  readonly module: string;
  readonly exportName: string;
  readonly options: unknown;
}

export interface ResolvedDrive {
  readonly file: string;
  readonly readOnly: boolean;
  readonly cache: 'writeback' | 'none' | 'unsafe';
  readonly id: string;
  readonly overlay: string | undefined;
  readonly onError: 'report' | 'end';
}

export interface ResolvedNetwork {
  readonly mac: string;
  readonly type: NetworkConfig['type'];
  /** The tap's name; undefined for others, whose host side is on the main thread. */
  readonly tap: string | undefined;
}

/** The virtio-vsock device: sockets between host and guest. */
export interface VsockConfig {
  /** The guest's address, 3 to 2^32 - 2; default 3. */
  readonly cid?: number;
  /**
   * Path of a Unix socket to make, for other processes of this user, as Firecracker's: a client sends `CONNECT <port>`
   * and a newline, and gets `OK <port>` and a newline. Connections of the guest to a port P of the host that has no
   * listener go to the Unix socket at this path with `_P` after it.
   */
  readonly socket?: string;
}

export interface ResolvedVsock {
  readonly cid: number;
  readonly socket: string | undefined;
}

/** The virtio devices of a machine, every default filled in. */
export interface DeviceConfig {
  readonly drives: readonly ResolvedDrive[];
  readonly networks: readonly ResolvedNetwork[];
  readonly consolePorts: readonly Required<ConsolePortConfig>[];
  readonly rng: { readonly bytesPerSecond: number } | undefined;
  readonly vsock: ResolvedVsock | undefined;
  readonly devices: readonly ResolvedDevice[];
  readonly acpi: 'auto' | 'on' | 'off';
}

/** What of a machine's configuration is about virtio devices. */
export interface DeviceOptions {
  /** virtio-blk drives: /dev/vda and on. */
  readonly drives?: readonly DriveConfig[];
  /** virtio-net devices: eth0 and on. */
  readonly networks?: readonly NetworkConfig[];
  /** Ports of the virtio console; none, and there is no such device. */
  readonly consolePorts?: readonly ConsolePortConfig[];
  /** The entropy device, at most so many bytes a second (`true`: 64 KiB); default none. */
  readonly rng?: boolean | { readonly bytesPerSecond: number };
  /** The socket device, for `machine.vsock`; default none. */
  readonly vsock?: boolean | VsockConfig;
  /** Devices of one's own; virtio devices come after all others. */
  readonly devices?: readonly DeviceModule[];
  /**
   * How the guest finds its devices: by ACPI tables alone (`on`), by the MP table and virtio_mmio.device= on the kernel's
   * command line alone (`off`), or by whichever it knows (`auto`, default).
   */
  readonly acpi?: 'auto' | 'on' | 'off';
}

const DEFAULT_CID = 3;
const DEFAULT_RNG_RATE = 65_536;
const MAX_DRIVE_ID = 20;
/** virtio-console numbers its ports with 16 bits; a machine needs few, and each has two queues. */
const MAX_CONSOLE_PORTS = 16;
const MAX_NAME = 64;
const NAME = /^[A-Za-z0-9._-]{1,64}$/;
const MAC = /^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i;

const DRIVE: FieldsOf<DriveConfig> = {
  file: true,
  readOnly: true,
  cache: true,
  id: true,
  overlay: true,
  onError: true,
};
const NETWORK: FieldsOf<NetworkConfig> = { type: true, mac: true, name: true, hostForwards: true, allow: true };
const FORWARD: FieldsOf<HostForward> = {
  protocol: true,
  hostAddress: true,
  hostPort: true,
  guestAddress: true,
  guestPort: true,
};
const PORT: FieldsOf<ConsolePortConfig> = { name: true, console: true };
const DEVICE: FieldsOf<DeviceModule> = { module: true, export: true, name: true, options: true };
const VSOCK: FieldsOf<VsockConfig> = { cid: true, socket: true };

/** Checks the devices and fills in the defaults. @throws UsageError that names the field. */
export function resolveDevices(options: DeviceOptions): DeviceConfig {
  const { drives = [], networks = [], consolePorts = [], devices = [], acpi = 'auto' } = options;
  for (const [name, list] of Object.entries({ drives, networks, consolePorts, devices })) checkList(list, name);
  if (!['auto', 'on', 'off'].includes(acpi)) throw new UsageError(`acpi: ${acpi} is not auto, on or off`);
  const resolved = {
    drives: drives.map(resolveDrive),
    networks: networks.map(resolveNetwork),
    consolePorts: resolvePorts(consolePorts),
    rng: resolveRng(options.rng),
    vsock: resolveVsock(options.vsock),
    devices: resolveModules(devices),
    acpi,
  };
  const count = virtioDeviceCount(resolved);
  if (count > MAX_VIRTIO_DEVICES) {
    throw new UsageError(`${count} virtio devices: a machine has room for ${MAX_VIRTIO_DEVICES}`);
  }
  return resolved;
}

/** How many virtio devices a machine has without those of `devices`: they take the slots of layout.ts in order. */
export function virtioDeviceCount({ drives, networks, consolePorts, rng, vsock }: DeviceConfig): number {
  return drives.length + networks.length + (consolePorts.length > 0 ? 1 : 0) + (rng ? 1 : 0) + (vsock ? 1 : 0);
}

function resolveDrive(drive: DriveConfig, index: number): ResolvedDrive {
  const field = `drives[${index}]`;
  checkFields(drive, field, DRIVE);
  const { file, readOnly = false, cache = 'writeback', id = String(index), overlay, onError = 'report' } = drive;
  if (typeof readOnly !== 'boolean') throw new UsageError(`${field}.readOnly: ${readOnly} is neither true nor false`);
  for (const [name, path] of [
    ['file', file],
    ['overlay', overlay ?? '-'],
  ] as const) {
    if (typeof path !== 'string' || path === '' || path.includes('\0')) {
      throw new UsageError(`${field}.${name}: must be a path`);
    }
  }
  if (!['writeback', 'none', 'unsafe'].includes(cache)) {
    throw new UsageError(`${field}.cache: ${cache} is not writeback, none or unsafe`);
  }
  if (typeof id !== 'string' || !/^[\x21-\x7e]*$/.test(id) || id.length > MAX_DRIVE_ID) {
    throw new UsageError(`${field}.id: must be at most ${MAX_DRIVE_ID} ASCII characters`);
  }
  if (onError !== 'report' && onError !== 'end') {
    throw new UsageError(`${field}.onError: ${onError} is neither report nor end`);
  }
  if (readOnly && overlay !== undefined) throw new UsageError(`${field}: a read-only drive needs no overlay`);
  return { file, readOnly, cache, id, overlay, onError };
}

function resolveNetwork(network: NetworkConfig, index: number): ResolvedNetwork {
  const field = `networks[${index}]`;
  checkFields(network, field, NETWORK);
  // Locally administered, QEMU's prefix: one for each device of a machine.
  const { type, mac = `52:54:00:12:34:${(0x56 + index).toString(16)}` } = network;
  if (typeof mac !== 'string' || !MAC.test(mac))
    throw new UsageError(`${field}.mac: '${mac}' is not like 52:54:00:12:34:56`);
  if (Number.parseInt(mac.slice(0, 2), 16) & 1) throw new UsageError(`${field}.mac: ${mac} is a group address`);
  if (type === 'user') {
    const { allow, hostForwards = [] } = network;
    if (allow !== undefined && typeof allow !== 'function') throw new UsageError(`${field}.allow: must be a function`);
    checkList(hostForwards, `${field}.hostForwards`);
    for (const [at, forward] of hostForwards.entries()) checkFields(forward, `${field}.hostForwards[${at}]`, FORWARD);
  }
  if (type === 'user' || type === 'frames') return { mac, type, tap: undefined };
  if (type !== 'tap') throw new UsageError(`${field}.type: ${type} is not tap, user or frames`);
  const { name } = network;
  // The kernel's dev_valid_name: at most 15 bytes, no slash, colon or blank.
  if (typeof name !== 'string' || !/^[^/:\s\0%]{1,15}$/.test(name) || name === '.' || name === '..') {
    throw new UsageError(`${field}.name: '${name}' is not the name of a network interface`);
  }
  return { mac, type, tap: name };
}

function resolvePorts(ports: readonly ConsolePortConfig[]): Required<ConsolePortConfig>[] {
  if (ports.length > MAX_CONSOLE_PORTS) throw new UsageError(`consolePorts: at most ${MAX_CONSOLE_PORTS}`);
  const names = new Set<string>();
  return ports.map((port, index) => {
    checkFields(port, `consolePorts[${index}]`, PORT);
    const { name, console = false } = port;
    checkName(name, `consolePorts[${index}].name`, names);
    return { name, console };
  });
}

function resolveModules(modules: readonly DeviceModule[]): ResolvedDevice[] {
  const names = new Set<string>();
  return modules.map((device, index) => {
    const field = `devices[${index}]`;
    checkFields(device, field, DEVICE);
    const { module, export: exportName = 'default', name, options } = device;
    const url = moduleUrl(module);
    if (!url) throw new UsageError(`${field}.module: '${module}' is neither a path nor a file: URL`);
    if (typeof exportName !== 'string' || exportName === '') throw new UsageError(`${field}.export: must be a name`);
    const own = name ?? parse(fileURLToPath(url)).name;
    checkName(own, `${field}.name`, names);
    if (OWN_NAMES.test(own)) throw new UsageError(`${field}.name: '${own}' is a device of the machine's own`);
    try {
      return { name: own, module: url.href, exportName, options: structuredClone(options) };
    } catch (error) {
      const why = (error as Error).message.replaceAll(/\s+/g, ' ');
      throw new UsageError(`${field}.options: ${why}`, { cause: error });
    }
  });
}

/** @param module path or file: URL. @returns undefined when it is neither. */
export function moduleUrl(module: string | URL): URL | undefined {
  if (module === '' || !(typeof module === 'string' || module instanceof URL)) return undefined;
  const isPath = typeof module === 'string' && !/^(file|data|node|https?):/.test(module);
  const url = isPath ? pathToFileURL(module) : parseUrl(String(module));
  return url?.protocol === 'file:' && url.hostname === '' ? url : undefined;
}

function parseUrl(text: string): URL | undefined {
  return URL.canParse(text) ? new URL(text) : undefined;
}

function checkName(name: string, field: string, taken: Set<string>): void {
  if (typeof name !== 'string' || !NAME.test(name)) {
    throw new UsageError(`${field}: '${name}' is not letters, digits and ._- (at most ${MAX_NAME})`);
  }
  if (taken.has(name)) throw new UsageError(`${field}: there is a '${name}' already`);
  taken.add(name);
}

function resolveRng(rng: DeviceOptions['rng']): { bytesPerSecond: number } | undefined {
  if (!rng) return undefined;
  if (rng !== true) checkFields(rng, 'rng', { bytesPerSecond: true });
  const bytesPerSecond = rng === true ? DEFAULT_RNG_RATE : rng.bytesPerSecond;
  if (!(bytesPerSecond >= 1 && bytesPerSecond <= 2 ** 31)) {
    throw new UsageError(`rng.bytesPerSecond: ${bytesPerSecond} is not a number from 1 to 2^31`);
  }
  return { bytesPerSecond };
}

function resolveVsock(vsock: DeviceOptions['vsock']): ResolvedVsock | undefined {
  if (!vsock) return undefined;
  if (vsock !== true) checkFields(vsock, 'vsock', VSOCK);
  const { cid = DEFAULT_CID, socket } = vsock === true ? {} : vsock;
  // 0, 1 and 2^32 - 1 are reserved, 2 is the host (virtio 1.2 section 5.10.4).
  if (!(Number.isInteger(cid) && cid >= DEFAULT_CID && cid < 2 ** 32 - 1)) {
    throw new UsageError(`vsock.cid: ${cid} is not a number from 3 to 2^32 - 2`);
  }
  if (socket !== undefined && (typeof socket !== 'string' || socket === '' || socket.includes('\0'))) {
    throw new UsageError('vsock.socket: must be a path');
  }
  return { cid, socket };
}
