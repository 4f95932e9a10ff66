import { type SpawnSyncReturns, spawnSync } from 'node:child_process';
import { now } from '#dist/machine/end.js';
import { Machine } from '#dist/machine/machine.js';
import { compileReference } from './compile.js';

/** Runs a bench guest by tsvisor's library, as any program would. @returns its milestones in ms since the start. */
export async function runMachine(elf: string): Promise<number[]> {
  const start = now();
  await using machine = await Machine.create({ kernel: elf, onReset: 'end' });
  await machine.start();
  const end = await machine.wait();
  if (end.reason !== 'guest-exit' || end.code !== 0) throw new Error(`the bench guest failed: ${end.message}`);
  const { stats } = await machine.query();
  return Object.values(stats.milestones)
    .map((at) => at - start)
    .sort((a, b) => a - b);
}

/** Runs a bench guest by the C reference, some times in one process. @returns as runMachine, of each. */
export function runReference(elf: string, rounds = 1): number[][] {
  const { stdout } = checked(compileReference('vmm.c'), [elf, String(rounds)], 0);
  const lines = stdout.trim().split('\n');
  return lines.map((line) => line.trim().split(' ').map(Number));
}

/** Runs a program to its end. @returns how long that took in ms. @throws Error when it ends with another exit code. */
export function timeProcess(program: string, args: readonly string[], exitCode = 0): number {
  const start = now();
  checked(program, args, exitCode);
  return now() - start;
}

function checked(program: string, args: readonly string[], exitCode: number): SpawnSyncReturns<string> {
  const result = spawnSync(program, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'], timeout: 60_000 });
  if (result.error) throw new Error(`${program}: ${result.error.message}`);
  if (result.status === exitCode) return result;
  const how = result.signal ? `was ended by ${result.signal}` : `exited with ${result.status}`;
  throw new Error(`${program} ${how}: ${result.stderr.trim().split('\n')[0]}`);
}
