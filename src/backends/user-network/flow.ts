import type { Counters } from './counters.js';

/** What the guest wants to reach: addresses as the guest knows them, so the host itself is 10.0.2.2. */
export interface Flow {
  readonly protocol: 'tcp' | 'udp' | 'dns';
  readonly address: string;
  readonly port: number;
  /** The name in a DNS question, without the last dot. */
  readonly name?: string;
}

export type Allow = (flow: Flow) => boolean | Promise<boolean>;

/** The user's decision about flows. An `allow` that throws or rejects refuses. */
export class Policy {
  readonly #allow: Allow | undefined;
  readonly #counters: Counters;

  constructor(allow: Allow | undefined, counters: Counters) {
    this.#allow = allow;
    this.#counters = counters;
  }

  /** Calls `then` with the decision: at once if it is known at once. */
  decide(flow: () => Flow, then: (allowed: boolean) => void): void {
    if (!this.#allow) {
      then(true);
      return;
    }
    const answer = (allowed: unknown) => {
      if (allowed !== true) this.#counters.refused++;
      then(allowed === true);
    };
    let result: boolean | Promise<boolean>;
    try {
      result = this.#allow(flow());
    } catch {
      answer(false);
      return;
    }
    if (typeof result === 'object') void Promise.resolve(result).then(answer, () => answer(false));
    else answer(result);
  }
}
