import { exitName } from '../kvm/exits.js';
import type { MachineStats } from './end.js';
import { now } from './end.js';

const EXIT_REASONS = 64;

/** Counters and time stamps of one machine. Counting allocates nothing. */
export class Statistics {
  /** Those that count for themselves, by name. */
  readonly devices = new Map<string, { readonly counters: Readonly<Record<string, number>> }>();
  readonly #exits = new Float64Array(EXIT_REASONS);
  readonly #assists = new Map<string, number>();
  readonly #milestones: Record<string, number> = {};
  readonly #phases: { vmCreated?: number; kernelLoaded?: number; firstEntry?: number; firstSerialByte?: number } = {};

  countExit(reason: number): void {
    this.#exits[reason] = (this.#exits[reason] as number) + 1;
  }

  /** The first time of each phase counts. */
  phase(name: keyof MachineStats['phases']): void {
    this.#phases[name] ??= now();
  }

  milestone(name: string): void {
    this.#milestones[name] ??= now();
  }

  assist(kind: string): void {
    this.#assists.set(kind, (this.#assists.get(kind) ?? 0) + 1);
  }

  snapshot(): MachineStats {
    const exits: Record<string, number> = {};
    this.#exits.forEach((count, reason) => {
      if (count > 0) exits[exitName(reason)] = count;
    });
    return {
      phases: { ...this.#phases },
      milestones: { ...this.#milestones },
      exits,
      assists: Object.fromEntries(this.#assists),
      devices: Object.fromEntries([...this.devices].map(([name, { counters }]) => [name, counters])),
    };
  }
}
