import type { GuestMemory } from '../../../memory/guest-memory.js';
import type { GuestCpu } from './cpu.js';
import { generalProtection } from './fault.js';
import type { CodeSource } from './instruction.js';

/** No instruction is longer (SDM 2A 2.3.11). */
export const MAX_LENGTH = 15;

const PAGE = 4096;

/** The bytes at RIP, fetched as far as the instruction goes, since the page after it may not be executable. */
export class CodeFetch implements CodeSource {
  readonly bytes = new Uint8Array(MAX_LENGTH);
  readonly #cpu: GuestCpu;
  readonly #memory: GuestMemory;
  #linear = 0n;
  #fetched = 0;

  constructor(cpu: GuestCpu, memory: GuestMemory) {
    this.#cpu = cpu;
    this.#memory = memory;
  }

  begin(): void {
    const { regs, sregs, mode } = this.#cpu;
    this.#linear = mode === 64 ? regs.rip : (regs.rip + sregs.segmentBase('cs')) & 0xffff_ffffn;
    this.#fetched = 0;
  }

  byte(offset: number): number {
    if (offset >= MAX_LENGTH) throw generalProtection();
    if (offset >= this.#fetched) this.#fetch();
    return this.bytes[offset] as number;
  }

  /** As many bytes as can be fetched. */
  available(): Uint8Array {
    try {
      this.byte(MAX_LENGTH - 1);
    } catch {
      // What there is will do.
    }
    return this.bytes.slice(0, this.#fetched);
  }

  /** Bytes up to the end of the page. */
  #fetch(): void {
    const cpu = this.#cpu;
    const physical = cpu.memory.fetchable(this.#linear + BigInt(this.#fetched), cpu.cpl === 3);
    const length = Math.min(MAX_LENGTH - this.#fetched, PAGE - (physical % PAGE));
    this.#memory.read(physical, this.bytes.subarray(this.#fetched, this.#fetched + length));
    this.#fetched += length;
  }
}
