import { MemoryError, UsageError } from '../errors.js';
import type { ConfigWithImages } from './default-guest.js';
import { type DeviceConfig, type DeviceOptions, resolveDevices } from './device-config.js';
import { checkFields, type FieldsOf } from './fields.js';
import { MAX_CPUS, PAGE_SIZE } from './layout.js';

/** What a machine is made of. */
export interface MachineConfig extends DeviceOptions {
  /** Path of a kernel: an ELF vmlinux, a bzImage, or an ELF with a PVH note. Default: the default guest's. */
  readonly kernel?: string;
  /** Path of an initial RAM disk. Default: the default guest's for its kernel, unless `append` names a root= file system. */
  readonly initrd?: string;
  /** Added after the command line that tsvisor chooses for this host. */
  readonly append?: string;
  /** Guest RAM in bytes, a multiple of 4096; default 64 MiB. */
  readonly memory?: number;
  /** Number of vCPUs, 1 to 254; default 1. KVM of the host may allow fewer. */
  readonly cpus?: number;
  /**
   * Whether the vCPU has a thread of its own, as several always have: requests to virtio devices then stop it no more, since
   * the thread that has the devices looks for them meanwhile, on a second processor while there are many; but each other exit
   * costs a hand-over between the two. Default false.
   */
  readonly vcpuThreads?: boolean;
  /** What a guest's reset does: `restart` boots it again (default), `end` ends the machine. */
  readonly onReset?: 'restart' | 'end';
  /** Whether ttyS0 is the guest's console (default) or the port is left out. */
  readonly serial?: boolean;
  /**
   * The guest's /dev/console: `ttyS0`, or `hvc0`, the first console port that is a terminal. Default ttyS0, and without
   * `serial` hvc0, if there is one. What the kernel says goes to ttyS0, where it exists, in any case.
   */
  readonly console?: 'ttyS0' | 'hvc0';
  /**
   * Whether the guest has tsvisor's agent, for exec(), fs and a graceful stop; it is reached by vsock. Default: the
   * default guest has it, other images do not. `true` brings it into any Linux image with a kernel that has virtio-vsock.
   */
  readonly agent?: boolean;
  /** Terminal type, rows and columns told to the default init through the command line. */
  readonly terminal?: { readonly type: string; readonly rows: number; readonly columns: number };
}

/** A configuration with every default filled in: what the machine thread gets. */
export interface ResolvedConfig extends DeviceConfig {
  readonly kernel: string;
  readonly initrd: string | undefined;
  readonly append: string;
  readonly memory: number;
  readonly cpus: number;
  readonly vcpuThreads: boolean;
  readonly onReset: 'restart' | 'end';
  readonly serial: boolean;
  readonly console: 'ttyS0' | 'hvc0' | undefined;
  readonly agent: boolean;
  /** Path of the agent's program, to be brought into the image; undefined where the image has it. */
  readonly agentProgram: string | undefined;
  /** Whether the image's init is known to be the default guest's, which can bring up CPUs that the kernel leaves to it. */
  readonly defaultInit: boolean;
  readonly terminal: MachineConfig['terminal'];
}

const MiB = 1024 * 1024;
export const DEFAULT_MEMORY = 64 * MiB;
/** Below this there is no room for the boot structures and any kernel. */
const MIN_MEMORY = 2 * MiB;
const MAX_MEMORY = 2 ** 40;

const FIELDS: FieldsOf<MachineConfig> = {
  kernel: true,
  initrd: true,
  append: true,
  memory: true,
  cpus: true,
  vcpuThreads: true,
  onReset: true,
  serial: true,
  console: true,
  agent: true,
  terminal: true,
  drives: true,
  networks: true,
  consolePorts: true,
  rng: true,
  vsock: true,
  devices: true,
  acpi: true,
};

/** What can be said before a default guest is built for it. @throws UsageError when it has a field that does not exist. */
export function checkConfig(config: MachineConfig): void {
  checkFields(config, '', FIELDS);
}

/** Checks every field and fills in the defaults. @throws UsageError or MemoryError that names the field. */
export function resolveConfig(config: ConfigWithImages): ResolvedConfig {
  const { kernel, initrd, append = '', memory = DEFAULT_MEMORY, cpus = 1, vcpuThreads = false } = config;
  const { onReset = 'restart', serial = true } = config;
  if (typeof kernel !== 'string' || kernel === '') throw new UsageError('kernel: the path of a kernel is needed');
  if (initrd !== undefined && (typeof initrd !== 'string' || initrd === '')) {
    throw new UsageError('initrd: must be the path of an initial RAM disk');
  }
  if (typeof append !== 'string' || append.includes('\0')) throw new UsageError('append: must be text without NUL');
  if (!Number.isSafeInteger(memory) || memory % PAGE_SIZE !== 0) {
    throw new UsageError(`memory: ${memory} is not a whole number of ${PAGE_SIZE}-byte pages`);
  }
  if (memory < MIN_MEMORY)
    throw new MemoryError(`memory: ${memory} bytes are too few to boot anything; give at least 2M`);
  if (memory > MAX_MEMORY) throw new MemoryError(`memory: ${memory} bytes are more than the 1024G a machine may have`);
  if (!(Number.isInteger(cpus) && cpus >= 1 && cpus <= MAX_CPUS)) {
    throw new UsageError(`cpus: ${cpus} is not a number of vCPUs; a machine has 1 to ${MAX_CPUS}`);
  }
  if (typeof vcpuThreads !== 'boolean') throw new UsageError(`vcpuThreads: ${vcpuThreads} is neither true nor false`);
  if (onReset !== 'restart' && onReset !== 'end')
    throw new UsageError(`onReset: ${onReset} is neither restart nor end`);
  if (typeof serial !== 'boolean') throw new UsageError(`serial: ${serial} is neither true nor false`);
  const terminal = resolveTerminal(config.terminal);
  const { agent = false, agentProgram, defaultInit = false } = config;
  if (typeof agent !== 'boolean') throw new UsageError(`agent: ${agent} is neither true nor false`);
  if (typeof defaultInit !== 'boolean') throw new UsageError(`defaultInit: ${defaultInit} is neither true nor false`);
  if (agent && config.vsock === false)
    throw new UsageError('vsock: the agent needs it; leave it out, or set agent: false');
  const devices = resolveDevices(agent ? { ...config, vsock: config.vsock ?? true } : config);
  const console = resolveConsole(config.console, serial, devices);
  const guest = { kernel, initrd, append, memory, cpus, vcpuThreads, onReset };
  return { ...guest, serial, console, agent, agentProgram, defaultInit, terminal, ...devices };
}

function resolveTerminal(terminal: MachineConfig['terminal']): MachineConfig['terminal'] {
  if (terminal === undefined) return undefined;
  checkFields(terminal, 'terminal', { type: true, rows: true, columns: true });
  const { type, rows, columns } = terminal;
  if (typeof type !== 'string' || /[\s\0"]/.test(type)) throw new UsageError('terminal.type: must be a word');
  for (const [name, value] of Object.entries({ rows, columns })) {
    if (Number.isInteger(value) && value >= 0 && value <= 65535) continue;
    throw new UsageError(`terminal.${name}: ${value} is not a whole number from 0 to 65535`);
  }
  return terminal;
}

function resolveConsole(
  wanted: MachineConfig['console'],
  serial: boolean,
  { consolePorts }: DeviceConfig,
): ResolvedConfig['console'] {
  const hvc = consolePorts.some(({ console }) => console);
  if (wanted === undefined) return serial ? 'ttyS0' : hvc ? 'hvc0' : undefined;
  if (wanted !== 'ttyS0' && wanted !== 'hvc0') throw new UsageError(`console: ${wanted} is neither ttyS0 nor hvc0`);
  if (wanted === 'ttyS0' ? !serial : !hvc) {
    const lack = wanted === 'ttyS0' ? 'serial is false' : 'no console port has console: true';
    throw new UsageError(`console: there is no ${wanted}, since ${lack}`);
  }
  return wanted;
}
