import { availableParallelism, cpus, loadavg, release } from 'node:os';
import { detectKvmFlavour } from '#dist/arch/x86_64/assist/detect.js';
import type { HostFacts } from './result.js';

export function hostFacts(): HostFacts {
  return {
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: availableParallelism(),
    kernel: release(),
    kvm: detectKvmFlavour(),
    node: process.version,
    load: loadavg().map((value) => Number(value.toFixed(2))),
  };
}

/** What to say of a host that is too busy for its numbers to be trusted; undefined when it is idle enough. */
export function loadWarning({ load, cores }: HostFacts): string | undefined {
  const [lastMinute = 0] = load;
  if (lastMinute <= cores / 2) return undefined;
  return `the load average is ${lastMinute} on ${cores} cores: trust the ratios more than the times, and neither much`;
}
