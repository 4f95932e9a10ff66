import { fileURLToPath } from 'node:url';
import { detectKvmFlavour } from '#dist/arch/x86_64/assist/detect.js';
import { Machine } from '#dist/index.js';
import { commandLine } from '#dist/machine/command-line.js';
import { DEFAULT_MEMORY, resolveConfig } from '#dist/machine/config.js';
import { initramfsPath, kernelPath } from '#dist/machine/default-guest.js';
import { now } from '#dist/machine/end.js';
import { interleave, whoCan } from './interleave.js';
import { peersUntil, timeUntil } from './peers.js';
import type { Bench, Measurement, Peer } from './result.js';

const ROUNDS = 5;

/** What the shell of the default guest prints when it waits. */
const PROMPT = /\/ # /;

/** From nothing to a Linux that can be used. */
export const boot: Bench = {
  name: 'boot',
  describe: 'the default guest from power-on to its first program, a shell prompt and its agent',
  async run({ rounds = ROUNDS }) {
    const kernel = await kernelPath();
    const initrd = await initramfsPath();
    const config = resolveConfig({ kernel, initrd, vsock: false });
    const guest = { kernel, initrd, append: commandLine(config, detectKvmFlavour()), memory: DEFAULT_MEMORY / 2 ** 20 };
    const { able, absent } = await whoCan(peersUntil(PROMPT, guest));

    const cli = fileURLToPath(import.meta.resolve('../../bin/tsvisor.js'));
    const stages: Stages[] = [];
    const { tsvisor = [], ...peers } = await interleave<'tsvisor' | Peer>(rounds, {
      tsvisor: async () => {
        stages.push(await bootMachine());
        return [await timeUntil(PROMPT, process.execPath, [cli, 'run', '--kernel', kernel, '--initrd', initrd])];
      },
      ...Object.fromEntries(Object.entries(able).map(([peer, time]) => [peer, async () => [await time()]])),
    });
    const stage = (name: string, of: (stages: Stages) => number): Measurement => {
      return { name, unit: 'ms', better: 'lower', tsvisor: stages.map(of), peers: {} };
    };
    return [
      { name: 'command line to shell prompt', unit: 'ms', better: 'lower', tsvisor, peers, absent },
      stage('machine made', ({ made }) => made),
      stage('first instruction to the first program, /init', ({ init }) => init),
      stage('first instruction to the agent', ({ agent }) => agent),
    ];
  },
};

interface Stages {
  readonly made: number;
  readonly init: number;
  readonly agent: number;
}

/** By the library, in a process that has done so before. */
async function bootMachine(): Promise<Stages> {
  const start = now();
  await using machine = await Machine.create();
  await machine.start();
  await machine.ready();
  const ready = now();
  const { phases, milestones } = await machine.metrics();
  const { firstEntry = Number.NaN } = phases;
  return {
    made: firstEntry - start,
    init: (milestones.init ?? Number.NaN) - firstEntry,
    agent: ready - firstEntry,
  };
}
