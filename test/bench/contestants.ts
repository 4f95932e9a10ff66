import { execFile, type SpawnSyncReturns, spawnSync } from 'node:child_process';
import { detectKvmFlavour } from '#dist/arch/x86_64/assist/detect.js';
import { now } from '#dist/machine/end.js';
import { Machine } from '#dist/machine/machine.js';
import { compileReference } from './compile.js';

const PROCESS_TIMEOUT = 60_000;

/** Runs a bench guest by tsvisor's library, as any program would. @returns its milestones in ms since the start. */
export async function runMachine(elf: string, vcpuThreads = false): Promise<number[]> {
  const start = now();
  await using machine = await Machine.create({ kernel: elf, onReset: 'end', vcpuThreads });
  await machine.start();
  const end = await machine.wait();
  if (end.reason !== 'guest-exit' || end.code !== 0) throw new Error(`the bench guest failed: ${end.message}`);
  const { milestones } = await machine.metrics();
  return Object.values(milestones)
    .map((at) => at - start)
    .sort((a, b) => a - b);
}

/** Runs a bench guest by the C reference, some times in one process. @returns as runMachine, of each. */
export function runReference(elf: string, rounds = 1, threaded = false): number[][] {
  const { stdout } = checked(compileReference('vmm.c'), [elf, String(rounds), ...(threaded ? ['threaded'] : [])], 0);
  const lines = stdout.trim().split('\n');
  return lines.map((line) => line.trim().split(' ').map(Number));
}

/** Runs a program to its end. @returns how long that took in ms. @throws Error when it ends with another exit code. */
export function timeProcess(program: string, args: readonly string[], exitCode = 0): number {
  const start = now();
  checked(program, args, exitCode);
  return now() - start;
}

/** QEMU by the name of its program. */
export const QEMU = 'qemu-system-x86_64';
/** What QEMU's isa-debug-exit makes of code 0: (code << 1) | 1. */
export const QEMU_EXIT = 1;

/**
 * QEMU's smallest machine, with a kernel by the PVH protocol that ends by port 0xf4.
 * @param memory in MiB. @param legacy with the interrupt controller and timer of a PC, which Linux looks for.
 */
export function qemuArguments(kernel: string, memory: number, serial: boolean, legacy = false): string[] {
  // A nested KVM that interprets refuses the MSR behind this feature, and QEMU then refuses to start.
  const cpu = detectKvmFlavour() === 'interpreted' ? 'host,-arch-capabilities' : 'host';
  // Without ACPI it tells the kernel by its command line where its virtio devices are.
  const old = legacy ? 'on' : 'off';
  const machine = `microvm,acpi=off,x-option-roms=off,rtc=off,pit=${old},pic=${old},isa-serial=${serial ? 'on' : 'off'}`;
  return [
    ...['-M', machine, '-nodefaults', '-no-user-config', '-nographic', '-enable-kvm', '-cpu', cpu, '-m', `${memory}`],
    ...['-global', 'virtio-mmio.force-legacy=false', '-device', 'isa-debug-exit,iobase=0xf4,iosize=0x01'],
    ...['-kernel', kernel],
  ];
}

/** Runs a program to its end without blocking. @returns what it printed. @throws Error as timeProcess. */
export function outputOf(program: string, args: readonly string[], exitCode = 0): Promise<string> {
  return new Promise((resolve, reject) => {
    const done = (
      error: (Error & { code?: number | string | null; signal?: string }) | null,
      out: string,
      err: string,
    ) => {
      if ((error?.code ?? 0) === exitCode) return resolve(out);
      if (typeof error?.code === 'string') return reject(new Error(`${program}: ${error.message}`));
      const how = error?.signal ? `was ended by ${error.signal}` : `exited with ${error?.code ?? 0}`;
      reject(new Error(`${program} ${how}: ${(err.trim() || out.trim()).split('\n')[0]}`));
    };
    execFile(program, args, { encoding: 'utf8', timeout: PROCESS_TIMEOUT }, done).stdin?.end();
  });
}

function checked(program: string, args: readonly string[], exitCode: number): SpawnSyncReturns<string> {
  const result = spawnSync(program, args, {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    timeout: PROCESS_TIMEOUT,
  });
  if (result.error) throw new Error(`${program}: ${result.error.message}`);
  if (result.status === exitCode) return result;
  const how = result.signal ? `was ended by ${result.signal}` : `exited with ${result.status}`;
  throw new Error(`${program} ${how}: ${result.stderr.trim().split('\n')[0]}`);
}
