import { layout, ports } from '#dist/machine/layout.js';
import { compileGuest } from './compile.js';
import { runMachine, runReference } from './contestants.js';
import { interleave } from './interleave.js';
import type { Bench, Measurement } from './result.js';

const ROUNDS = 9;
/**
 * Short ones and many: the median is then one that nothing else interrupted. A stamp costs tsvisor some 50 us, which is
 * at most half a percent of a segment.
 */
const SEGMENTS = 24;

/** Exits of each segment, multiples of 16, by privilege level: from CPL 3 they can cost several times as much. */
const EXITS = { 0: 1920, 3: 400 } as const;
/** Exits before the first segment: half a second, in which V8 replaces the loop although it compiles beside other work. */
const WARM_UP = { 0: 96_000, 3: 32_000 } as const;

/** The UART's scratch register: the cheapest device there is, so that it is the way to it that counts. */
const PORT = ports.serial.base + 7;
/** No device is here: virtio's are far below. */
const MMIO = layout.ioapic - 0x10_0000;

/** One exit handled in TypeScript against the same in C. */
export const exits: Bench = {
  name: 'exits',
  describe: 'one port or MMIO exit, handled in TypeScript and in C, inline and by another thread',
  async run({ rounds = ROUNDS }) {
    const measurements: Measurement[] = [];
    for (const vcpuThreads of [false, true]) {
      for (const cpl of [0, 3] as const) {
        const counts = { CPL: cpl, SEGMENTS, EXITS: EXITS[cpl], WARMUP: WARM_UP[cpl] };
        for (const [kind, target] of [
          ['PIO', { PORT }],
          ['MMIO', { MMIO }],
        ] as const) {
          const elf = compileGuest('exits.S', { ...counts, ...target });
          const perExit = (stamps: readonly number[]) => microsecondsPerExit(stamps, EXITS[cpl]);
          const { tsvisor = [], c = [] } = await interleave(rounds, {
            c: () => runReference(elf, 1, vcpuThreads).flatMap(perExit),
            tsvisor: async () => perExit(await runMachine(elf, vcpuThreads)),
          });
          const name = `${kind} write, CPL${cpl}${vcpuThreads ? ', handed to another thread' : ''}`;
          measurements.push({ name, unit: 'us', better: 'lower', tsvisor, peers: { c } });
        }
      }
    }
    return measurements;
  },
};

/** @param stamps milliseconds between which the guest did `count` exits each. */
function microsecondsPerExit(stamps: readonly number[], count: number): number[] {
  if (stamps.length !== SEGMENTS + 1) throw new Error(`the bench guest stamped ${stamps.length} milestones`);
  return stamps.slice(1).map((at, i) => ((at - (stamps[i] as number)) * 1e3) / count);
}
