import { accessSync, constants, existsSync, readFileSync } from 'node:fs';
import { arch, platform } from 'node:os';
import type { Argv } from 'yargs';
import { detectKvmFlavour } from '../arch/x86_64/assist/detect.js';
import { type ErrorCode, errorToData } from '../errors.js';
import { addon } from '../kvm/addon.js';
import * as abi from '../kvm/generated/abi.js';
import { Kvm } from '../kvm/kvm.js';
import { ERROR_EXIT } from './exit-codes.js';
import { formatSize } from './size.js';

/** `lack`: machines cannot run. `warn`: something is missing that only some uses need. */
type Status = 'ok' | 'warn' | 'lack';

interface Finding {
  readonly check: string;
  readonly status: Status;
  readonly finding: string;
  readonly remedy?: string;
}

export function builder(yargs: Argv) {
  return yargs
    .option('json', { type: 'boolean', default: false, describe: 'one JSON object on stdout' })
    .epilogue('Exit codes: 0 machines can run here, 69 no usable KVM, 77 no permission for it.');
}

export async function handler(args: { json: boolean }): Promise<void> {
  const { findings, failure } = examine();
  if (args.json) process.stdout.write(`${JSON.stringify({ canRun: failure === undefined, findings }, null, 2)}\n`);
  else process.stdout.write(`${findings.map(line).join('\n')}\n`);
  process.exitCode = failure === undefined ? 0 : ERROR_EXIT[failure];
}

const MARKS: Readonly<Record<Status, string>> = { ok: 'ok  ', warn: 'warn', lack: 'LACK' };

function line({ check, status, finding, remedy }: Finding): string {
  return `${MARKS[status]}  ${check.padEnd(13)} ${finding}${remedy ? `\n${' '.repeat(20)}-> ${remedy}` : ''}`;
}

function examine(): { findings: Finding[]; failure: ErrorCode | undefined } {
  const findings: Finding[] = [hostFinding()];
  let failure: ErrorCode | undefined;
  try {
    using kvm = Kvm.open();
    findings.push({ check: '/dev/kvm', status: 'ok', finding: `opens; API version ${abi.KVM_API_VERSION}` });
    findings.push(flavourFinding(), ...capabilityFindings(kvm));
    if (findings.some((f) => f.status === 'lack')) failure = 'ERR_KVM_UNSUPPORTED';
  } catch (error) {
    const { code, message } = errorToData(error);
    failure = code;
    const [finding = message, remedy] = message.split('; ');
    findings.push({ check: '/dev/kvm', status: 'lack', finding, ...(remedy === undefined ? {} : { remedy }) });
  }
  findings.push(tunFinding(), memoryFinding(), ...toolFindings());
  return { findings, failure };
}

function hostFinding(): Finding {
  const cpu = /^model name\s*: (.*)$/m.exec(readText('/proc/cpuinfo'))?.[1] ?? 'unknown CPU';
  const finding = `${platform()} ${arch()}, ${cpu}, Node ${process.versions.node}`;
  if (platform() === 'linux' && arch() === 'x64') return { check: 'host', status: 'ok', finding };
  return { check: 'host', status: 'lack', finding, remedy: 'tsvisor runs on x86-64 Linux' };
}

function flavourFinding(): Finding {
  if (detectKvmFlavour() === 'hardware') {
    return { check: 'virtualization', status: 'ok', finding: 'hardware (VMX or SVM)' };
  }
  return {
    check: 'virtualization',
    status: 'warn',
    finding:
      'none in hardware: KVM interprets guest kernels (about 1 million instructions a second); tsvisor completes the rest',
    remedy: 'for full speed use a host with VMX or SVM, or ask the cloud for nested virtualization',
  };
}

/** What every machine needs. */
const NEEDED = {
  KVM_CAP_USER_MEMORY: abi.KVM_CAP_USER_MEMORY,
  KVM_CAP_IRQCHIP: abi.KVM_CAP_IRQCHIP,
  KVM_CAP_PIT2: abi.KVM_CAP_PIT2,
  KVM_CAP_EXT_CPUID: abi.KVM_CAP_EXT_CPUID,
  KVM_CAP_SET_TSS_ADDR: abi.KVM_CAP_SET_TSS_ADDR,
  KVM_CAP_SET_IDENTITY_MAP_ADDR: abi.KVM_CAP_SET_IDENTITY_MAP_ADDR,
  KVM_CAP_IMMEDIATE_EXIT: abi.KVM_CAP_IMMEDIATE_EXIT,
};

/** What the assist of an interpreting KVM needs besides. */
const NEEDED_BY_ASSIST = {
  KVM_CAP_SYNC_REGS: abi.KVM_CAP_SYNC_REGS,
  KVM_CAP_X86_USER_SPACE_MSR: abi.KVM_CAP_X86_USER_SPACE_MSR,
  KVM_CAP_X86_MSR_FILTER: abi.KVM_CAP_X86_MSR_FILTER,
  KVM_CAP_SET_GUEST_DEBUG: abi.KVM_CAP_SET_GUEST_DEBUG,
  KVM_CAP_XSAVE2: abi.KVM_CAP_XSAVE2,
  KVM_CAP_XCRS: abi.KVM_CAP_XCRS,
  KVM_CAP_VCPU_EVENTS: abi.KVM_CAP_VCPU_EVENTS,
};

/** What makes machines better. */
const WELCOME = {
  KVM_CAP_IRQFD: abi.KVM_CAP_IRQFD,
  KVM_CAP_IOEVENTFD: abi.KVM_CAP_IOEVENTFD,
  KVM_CAP_TSC_DEADLINE_TIMER: abi.KVM_CAP_TSC_DEADLINE_TIMER,
};

function capabilityFindings(kvm: Kvm): Finding[] {
  const needed = detectKvmFlavour() === 'interpreted' ? { ...NEEDED, ...NEEDED_BY_ASSIST } : NEEDED;
  const absent = (capabilities: Readonly<Record<string, number>>) =>
    Object.entries(capabilities)
      .filter(([, capability]) => kvm.checkExtension(capability) <= 0)
      .map(([name]) => name);
  const lacking = absent(needed);
  const optional = absent(WELCOME);
  const vcpus = kvm.checkExtension(abi.KVM_CAP_MAX_VCPUS);
  const slots = kvm.checkExtension(abi.KVM_CAP_NR_MEMSLOTS);
  const found = `all ${Object.keys(needed).length} that machines need; up to ${vcpus} vCPUs and ${slots} memory slots`;
  const result: Finding[] = [
    lacking.length === 0
      ? { check: 'capabilities', status: 'ok', finding: found }
      : {
          check: 'capabilities',
          status: 'lack',
          finding: `without ${lacking.join(', ')}`,
          remedy: 'use a newer host kernel',
        },
  ];
  if (optional.length > 0) {
    result.push({ check: 'capabilities', status: 'warn', finding: `without ${optional.join(', ')}` });
  }
  return result;
}

function tunFinding(): Finding {
  const path = '/dev/net/tun';
  if (!existsSync(path)) {
    return { check: 'tun', status: 'warn', finding: `no ${path}`, remedy: 'for tap networking: sudo modprobe tun' };
  }
  const fd = addon.open(path, 2);
  if (fd < 0) {
    const remedy = 'for tap networking run as root or give this user CAP_NET_ADMIN';
    return { check: 'tun', status: 'warn', finding: `${path} may not be opened`, remedy };
  }
  addon.close(fd);
  return { check: 'tun', status: 'ok', finding: `${path} opens` };
}

function memoryFinding(): Finding {
  const kib = (name: string) =>
    Number(new RegExp(`^${name}:\\s*(\\d+)`, 'm').exec(readText('/proc/meminfo'))?.[1] ?? 0);
  const available = kib('MemAvailable') * 1024;
  const finding = `${formatSize(available)} available of ${formatSize(kib('MemTotal') * 1024)}`;
  if (available >= 256 * 2 ** 20) return { check: 'memory', status: 'ok', finding };
  return { check: 'memory', status: 'warn', finding, remedy: 'a machine takes its --memory and about 100M besides' };
}

/** What building the default guest takes; not needed to run a kernel of one's own. */
function toolFindings(): Finding[] {
  const tools = { gcc: 'gcc', make: 'make', flex: 'flex', bison: 'bison', bc: 'bc', xz: 'xz-utils' };
  const missing = Object.entries(tools)
    .filter(([tool]) => !onPath(tool))
    .map(([, debianPackage]) => debianPackage);
  if (!existsSync('/bin/busybox')) missing.push('busybox-static');
  if (!existsSync('/usr/src/linux-source-6.1.tar.xz')) missing.push('linux-source-6.1');
  if (missing.length === 0) return [{ check: 'guest build', status: 'ok', finding: 'everything is installed' }];
  const remedy = `to build the default guest: sudo apt-get install ${missing.join(' ')}`;
  return [{ check: 'guest build', status: 'warn', finding: `without ${missing.join(', ')}`, remedy }];
}

function onPath(tool: string): boolean {
  return (process.env.PATH ?? '').split(':').some((folder) => {
    try {
      accessSync(`${folder}/${tool}`, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

function readText(path: string): string {
  try {
    return readFileSync(path, 'latin1');
  } catch {
    return '';
  }
}
