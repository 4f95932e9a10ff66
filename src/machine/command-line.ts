import type { KvmFlavour } from '../arch/x86_64/assist/detect.js';
import { AGENT_SERVICE_WORD, appendAgentInit } from '../boot/agent-archive.js';
import type { ResolvedConfig } from './config.js';
import { virtioDeviceCount } from './device-config.js';
import { virtioSlot } from './layout.js';
import type { DevicePlace } from './messages.js';

/** Arguments for every host, each with what it is for. */
const COMMON = [
  'reboot=k', // reset through the i8042, which ends this boot at once
  'panic=-1', // a panic resets too: a machine never hangs on one
];

/** The serial console, when there is one. 'r': RTS/CTS, so that a paste waits for the guest. */
const SERIAL = 'console=ttyS0,115200n8r';

/** For a guest kernel that is interpreted instruction by instruction. */
const INTERPRETED = [
  // CPUID's leaf 1 and 7 come back as the host's there, whatever KVM is told. With ERMS or FSRM copies take a step a byte
  // instead of one for eight (FSRM without ERMS loops for ever in memmove); popcnt, stac, clac and cmpxchg16b are exits;
  // SSSE3 and AVX-512VL select vector code in the kernel's random number generator that nothing interprets.
  'clearcpuid=erms,fsrm,popcnt,smap,cx16,ssse3,avx512vl',
  'quiet', // a character on the console is an exit
  'rodata=off', // no page-by-page walk to protect the kernel's text: 1 to 1.6 s
  'retain_initrd', // not poisoned and freed: 0.25 s
  // What distribution kernels have and the default one has not:
  'nowatchdog', // slow is not stuck
  'mitigations=off', // a kernel that is emulated does not speculate
  'cryptomgr.notests',
];

/** There, but for the default kernel, whose ticks are rare: a high-resolution tick takes longer than its period. */
const COARSE_TIMERS = 'highres=off';

/** For several vCPUs there, when init brings up all but the first: its start_cpus() says why. */
const CPUS_BY_INIT = [
  'maxcpus=1',
  'noreplace-smp', // nor are LOCK prefixes patched out for one CPU, and in again for the next
];

/** Users' devices, as far as the guest is told of them here. */
export interface DevicesOfUser {
  readonly virtio: readonly unknown[];
  readonly mmio: readonly { readonly name: string; readonly place: DevicePlace }[];
}

const NONE: DevicesOfUser = { virtio: [], mmio: [] };

/** The kernel command line: what suits this host, then what the user appends (Linux lets the last word win). */
export function commandLine(config: ResolvedConfig, flavour: KvmFlavour, devices = NONE): string {
  const words = config.serial ? [SERIAL] : [];
  if (config.console === 'hvc0') words.push('console=hvc0'); // the last one is /dev/console
  words.push(...COMMON);
  if (flavour === 'interpreted') {
    words.push(...INTERPRETED);
    if (!config.defaultInit) words.push(COARSE_TIMERS);
    else if (config.cpus > 1) words.push(...CPUS_BY_INIT, `tsvisor.cpus=${config.cpus}`);
  }
  if (config.terminal) {
    const { type, rows, columns } = config.terminal;
    words.push(`tsvisor.term=${type}`, `tsvisor.rows=${rows}`, `tsvisor.cols=${columns}`);
  }
  if (config.acpi !== 'on') {
    const count = virtioDeviceCount(config) + devices.virtio.length;
    for (let slot = 0; slot < count; slot++) {
      const { base, length, gsi } = virtioSlot(slot);
      words.push(`virtio_mmio.device=${length / 1024}K@0x${base.toString(16)}:${gsi}`);
    }
  }
  for (const { name, place } of devices.mmio) {
    const { base, gsi } = place;
    words.push(`tsvisor.device=${name}@0x${base.toString(16)}${gsi === undefined ? '' : `:${gsi}`}`);
  }
  const user = config.networks.findIndex(({ type }) => type === 'user');
  if (user >= 0) words.push(`tsvisor.net=eth${user}`); // the default init configures it
  if (config.agent && !config.agentProgram) words.push(AGENT_SERVICE_WORD);
  words.push(config.agentProgram ? appendAgentInit(config.append) : config.append);
  return words.join(' ').trim();
}
