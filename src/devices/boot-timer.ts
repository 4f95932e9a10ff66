import type { StateReader } from '../state-reader.js';
import { ByteDevice } from './byte-device.js';

/** A port by which a guest says how far it has booted: 1 `init`, 2 `shell`, any other n `milestone-n`. */
export class BootTimer extends ByteDevice {
  readonly name = 'boot-timer';
  readonly #onMilestone: (name: string) => void;
  readonly #seen = new Uint8Array(256);

  /** @param onMilestone called for the first stamp of each milestone only: at most 256 times until a reset. */
  constructor(onMilestone: (name: string) => void) {
    super();
    this.#onMilestone = onMilestone;
  }

  override readByte(): number {
    return 0xff;
  }

  override writeByte(offset: number, value: number): void {
    if (offset !== 0 || this.#seen[value]) return;
    this.#seen[value] = 1;
    this.#onMilestone(milestoneName(value));
  }

  reset(): void {
    this.#seen.fill(0);
  }

  /** The milestones stamped so far, as plain data. */
  save(): { readonly seen: readonly number[] } {
    return { seen: Array.from(this.#seen.keys()).filter((value) => this.#seen[value]) };
  }

  restore(state: StateReader): void {
    this.#seen.fill(0);
    for (const value of state.numbers('seen', this.#seen.length, 0, 0xff)) this.#seen[value] = 1;
  }
}

function milestoneName(value: number): string {
  if (value === 1) return 'init';
  return value === 2 ? 'shell' : `milestone-${value}`;
}
