/** A small, seeded generator (xoshiro128**), so that a failing run can be repeated. */
export class Random {
  readonly seed: number;
  readonly #state: Uint32Array;

  /** @param seed TSVISOR_SEED, or else a new one each run. */
  constructor(seed = Number(process.env.TSVISOR_SEED ?? Date.now() % 0x1_0000_0000)) {
    this.seed = seed;
    let z = seed >>> 0;
    // SplitMix32 spreads a small seed over the whole state.
    this.#state = Uint32Array.from({ length: 4 }, () => {
      z = (z + 0x9e3779b9) >>> 0;
      let t = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
      t = Math.imul(t ^ (t >>> 15), 0x735a2d97);
      return t ^ (t >>> 15);
    });
  }

  u32(): number {
    const s = this.#state as Uint32Array & [number, number, number, number];
    const x = Math.imul(s[1], 5);
    const result = Math.imul((x << 7) | (x >>> 25), 9) >>> 0;
    const t = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = (s[3] << 11) | (s[3] >>> 21);
    return result;
  }

  /** 0 to `limit` - 1. */
  below(limit: number): number {
    return this.u32() % limit;
  }

  chance(percent: number): boolean {
    return this.below(100) < percent;
  }

  pick<T>(choices: readonly T[]): T {
    return choices[this.below(choices.length)] as T;
  }

  /** 64 bits, often with the patterns that arithmetic trips over. */
  u64(): bigint {
    const value = (BigInt(this.u32()) << 32n) | BigInt(this.u32());
    switch (this.below(8)) {
      case 0:
        return this.pick([
          0n,
          1n,
          0xffff_ffff_ffff_ffffn,
          1n << 63n,
          0x8000_0000n,
          0xffff_ffffn,
          0x7fff_ffff_ffff_ffffn,
        ]);
      case 1:
        return 1n << BigInt(this.below(64));
      case 2:
        return value >> BigInt(this.below(64));
      default:
        return value;
    }
  }

  fill(bytes: Uint8Array): Uint8Array {
    for (let i = 0; i < bytes.length; i++) {
      // Whole runs of equal bytes now and then, as saturation and comparison like them.
      if (i % 16 === 0 && this.chance(10)) {
        bytes.fill(this.pick([0, 0xff, 0x80, 0x7f, 0x01]), i, i + 16);
        i += 15;
      } else bytes[i] = this.u32();
    }
    return bytes;
  }
}
