import crypto from 'node:crypto';
import { syncBuiltinESMExports } from 'node:module';
import { Rng } from '#dist/virtio/rng/rng.js';
import { Random } from '../../kvm/assist/random.js';
import type { FuzzMachine } from '../machine.js';
import type { Request, Subject, Target } from '../target.js';

const QUEUE_SIZE = 64;
const MAX_REQUEST = 4096;

/** What the host's generator gives, the same in every replay. */
let entropy = new Random(0);
crypto.randomFillSync = ((bytes: Uint8Array, offset = 0, size = bytes.length - offset) => {
  entropy.fill(bytes.subarray(offset, offset + size));
  return bytes;
}) as typeof crypto.randomFillSync;
syncBuiltinESMExports();

class RngSubject implements Subject {
  device: Rng;
  readonly #rate: number;
  #time = 0;
  #expired: () => void = () => {};
  #deadline: number | undefined;

  constructor(random: Random) {
    entropy = new Random(random.u32());
    this.#rate = random.pick([1, 100, 5000, 1 << 20]);
    this.device = this.#make();
  }

  renew(): Rng {
    this.#deadline = undefined;
    this.device = this.#make();
    return this.device;
  }

  #make(): Rng {
    return new Rng({
      bytesPerSecond: this.#rate,
      now: () => this.#time,
      timer: (onExpired) => {
        this.#expired = onExpired;
        return {
          arm: (microseconds) => {
            if (!(microseconds >= 1 && microseconds < 2 ** 32)) throw new RangeError(`a timer of ${microseconds} µs`);
            this.#deadline = this.#time + microseconds / 1e3;
          },
        };
      },
    });
  }

  queue(): number {
    return 0;
  }

  request(random: Random): Request {
    return {
      out: new Uint8Array(random.chance(90) ? 0 : random.below(20)),
      in: random.below(random.chance(80) ? 200 : 9000),
    };
  }

  hostEvent(random: Random): string {
    if (this.#deadline !== undefined && random.chance(70)) {
      this.settle();
      return 'the timer expires';
    }
    if (random.chance(10)) this.#expired(); // without cause
    this.#time += random.below(3000);
    return 'time goes by';
  }

  settle(): boolean {
    if (this.#deadline === undefined) return false;
    this.#time = Math.max(this.#time, this.#deadline);
    this.#deadline = undefined;
    this.#expired();
    return true;
  }

  serves(): boolean {
    return true;
  }

  probe({ driver }: FuzzMachine): void {
    driver.initialize({ queueSizes: [8] });
    this.#time += 1e7;
    const { written, data } = driver.queues[0]?.request([100]) ?? {};
    if (written !== 100 || data?.every((byte) => byte === 0)) throw new Error('no entropy');
  }
}

export const rng: Target = {
  name: 'rng',
  // A whole queue of the longest chains, each looked at once.
  limits: { accesses: QUEUE_SIZE * QUEUE_SIZE * 8 + 10_000, bytes: QUEUE_SIZE * MAX_REQUEST + 10_000 },
  subject: (random) => new RngSubject(random),
};
