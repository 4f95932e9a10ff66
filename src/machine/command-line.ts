import type { KvmFlavour } from '../arch/x86_64/assist/detect.js';
import type { ResolvedConfig } from './config.js';

/** Arguments for every host, each with what it is for. */
const COMMON = [
  'reboot=k', // reset through the i8042, which ends this boot at once
  'panic=-1', // a panic resets too: a machine never hangs on one
];

/** The console, when there is one. 'r': RTS/CTS, so that a paste waits for the guest. */
const CONSOLE = 'console=ttyS0,115200n8r';

/** For a guest kernel that is interpreted instruction by instruction. */
const INTERPRETED = [
  // CPUID is the host's there, whatever KVM is told. ERMS and FSRM make copies a step a byte instead of one for eight; the
  // others are instructions that KVM does not interpret, completed by tsvisor at some 20 µs each.
  'clearcpuid=erms,fsrm,popcnt,smap,invpcid,rdtscp',
  'tsc=reliable', // no watchdog that compares clocks
  'lpj=5000000', // no delay loop to calibrate
  'highres=off', // the timer tick of a high-resolution kernel takes longer than its period
  'nowatchdog', // slow is not stuck
  'rcupdate.rcu_cpu_stall_suppress=1',
  'mitigations=off', // a kernel that is emulated does not speculate
  'cryptomgr.notests',
  'rodata=off', // no page-by-page walk to protect a kernel that is emulated anyway
  'quiet', // a character on the console is an exit
];

/** The kernel command line: what suits this host, then what the user appends (Linux lets the last word win). */
export function commandLine(config: ResolvedConfig, flavour: KvmFlavour): string {
  const words = [...(config.serial ? [CONSOLE] : []), ...COMMON];
  if (flavour === 'interpreted') words.push(...INTERPRETED);
  if (config.terminal) {
    const { type, rows, columns } = config.terminal;
    words.push(`tsvisor.term=${type}`, `tsvisor.rows=${rows}`, `tsvisor.cols=${columns}`);
  }
  words.push(config.append);
  return words.join(' ').trim();
}
