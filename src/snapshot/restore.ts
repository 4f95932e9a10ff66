import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { SnapshotError, UsageError } from '../errors.js';
import { type ResolvedConfig, resolveConfig } from '../machine/config.js';
import type { ConfigWithImages } from '../machine/default-guest.js';
import type { DeviceModule, NetworkConfig, VsockConfig } from '../machine/device-config.js';
import { checkFields, type FieldsOf } from '../machine/fields.js';
import { type DriveOverride, restoreDisks } from './disks.js';
import { isUnchanged } from './file-reference.js';
import type { CheckedState } from './format.js';

/**
 * What a machine gets that goes on from a snapshot. A snapshot may be anybody's: of what it names on this host, only
 * files are opened that are still exactly what they were; taps, ports, sockets and modules are to be given again.
 */
export interface RestoreOptions {
  /** By drive: files in place of those that the snapshot refers to, and where the guest's writes go. */
  readonly drives?: readonly (DriveOverride | undefined)[];
  /** As many as the machine had, of the same types. Default: user-mode networks without host forwards. */
  readonly networks?: readonly NetworkConfig[];
  /** Another address of the guest's, and a Unix socket. */
  readonly vsock?: VsockConfig;
  /** The modules of the machine's own devices, as many as it had: they are code, and code is not in a snapshot. */
  readonly devices?: readonly DeviceModule[];
  /** Whether to note what is written from now on, for a differential snapshot. Default false. */
  readonly track?: boolean;
  /**
   * Whether the memory is read whole first and compared with the snapshot's checksums. Default false: nothing of it is
   * read before it is touched, and what is damaged in it the guest finds.
   */
  readonly verify?: boolean;
}

const FIELDS: FieldsOf<RestoreOptions> = {
  drives: true,
  networks: true,
  vsock: true,
  devices: true,
  track: true,
  verify: true,
};
const DRIVE: FieldsOf<DriveOverride> = { file: true, overlay: true };

/** A configuration for a machine that goes on from a snapshot. */
export interface RestoredConfig {
  readonly config: ResolvedConfig;
  readonly networks: readonly NetworkConfig[];
  /** A folder that goes with the machine. */
  readonly scratch: string | undefined;
}

/** @param folder of the snapshot. @throws SnapshotError, UsageError that names the option. */
export async function restoredConfig(
  state: Pick<CheckedState, 'config' | 'boot' | 'disks'>,
  folder: string,
  options: RestoreOptions,
): Promise<RestoredConfig> {
  checkFields(options, 'options', FIELDS);
  for (const [index, drive] of (options.drives ?? []).entries()) {
    if (drive !== undefined) checkFields(drive, `drives[${index}]`, DRIVE);
  }
  const saved = savedConfig(state.config);
  const networks = options.networks ?? (saved.networks ?? []).map(mayBeRestored);
  const devices = options.devices ?? saved.devices ?? [];
  if (options.devices === undefined && devices.length > 0) {
    throw new SnapshotError('snapshot: the machine has devices of its own; give their modules again as devices');
  }
  sameLength('networks', networks, saved.networks);
  sameLength('devices', devices, saved.devices);
  networks.forEach(({ type }, index) => {
    const before = saved.networks?.[index]?.type;
    // What the guest negotiated with one kind of network another may not offer.
    if (type !== before) throw new UsageError(`networks[${index}].type: the machine had ${before} there`);
  });
  const vsock = saved.vsock && { ...(typeof saved.vsock === 'object' && saved.vsock), ...options.vsock };
  let resolved: ResolvedConfig;
  try {
    resolved = resolveConfig({ ...saved, networks, devices, ...(vsock && { vsock }) });
  } catch (cause) {
    throw new SnapshotError(`snapshot: its configuration: ${(cause as Error).message}`, { cause });
  }
  let scratch: string | undefined;
  try {
    const drives = await restoreDisks(resolved.drives, state.disks, folder, options.drives ?? [], async () => {
      scratch ??= await mkdtemp(join(tmpdir(), 'tsvisor-'));
      return scratch;
    });
    // A reset would boot whatever is there now.
    const onReset = state.boot.every(isUnchanged) ? resolved.onReset : 'end';
    return { config: { ...resolved, drives, onReset }, networks, scratch };
  } catch (error) {
    if (scratch !== undefined) await rm(scratch, { recursive: true, force: true });
    throw error;
  }
}

/** A configuration as JSON can hold it: what only a program or this host can give is left out. */
export function portableConfig(config: ConfigWithImages): object {
  const { vsock, networks = [], devices = [], ...rest } = config;
  const cid = typeof vsock === 'object' ? vsock.cid : undefined;
  return {
    ...rest,
    ...(vsock !== undefined && { vsock: cid === undefined ? vsock !== false : { cid } }),
    networks: networks.map((network) => {
      const filtered = network.type === 'user' && network.allow !== undefined;
      return { type: network.type, ...(network.mac && { mac: network.mac }), ...(filtered && { filtered }) };
    }),
    devices: devices.map(({ name }) => ({ module: 'given again', ...(name && { name }) })),
  };
}

type SavedNetwork = NetworkConfig & { readonly filtered?: boolean };
type SavedConfig = ConfigWithImages & { readonly networks?: readonly SavedNetwork[] };

/** Whose fields are checked once the configuration is whole. */
function savedConfig(config: unknown): SavedConfig {
  if (typeof config !== 'object' || config === null) throw new SnapshotError('snapshot: it has no configuration');
  const { networks = [], devices = [] } = config as Record<string, unknown>;
  if (!Array.isArray(networks) || !Array.isArray(devices)) throw new SnapshotError('snapshot: damaged configuration');
  if (![...networks, ...devices].every((one) => typeof one === 'object' && one !== null)) {
    throw new SnapshotError('snapshot: damaged configuration');
  }
  return config as SavedConfig;
}

function mayBeRestored({ filtered, ...network }: SavedNetwork, index: number): NetworkConfig {
  if (network.type !== 'tap' && !filtered) return network;
  const what = filtered ? 'a filter, which only a program can have' : 'a tap of the host';
  throw new SnapshotError(`snapshot: networks[${index}] has ${what}; give networks again`);
}

function sameLength(name: string, now: readonly unknown[], before: readonly unknown[] = []): void {
  if (now.length === before.length) return;
  throw new UsageError(`${name}: ${now.length} are given, but the machine had ${before.length}`);
}
