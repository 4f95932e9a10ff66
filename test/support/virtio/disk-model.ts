import { expect } from 'vitest';
import * as abi from '#dist/virtio/generated/virtio.js';
import { type BlkRig, header, IOERR, OK, range, SECTOR, statusOf } from './blk-rig.js';

/** mulberry32: numbers from 0 to 1 that a seed repeats. */
export function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Bytes that a seed repeats. @param length a multiple of 4. */
export function noise(length: number, seed = 1): Uint8Array {
  const next = random(seed);
  return new Uint8Array(Uint32Array.from({ length: length / 4 }, () => next() * 2 ** 32).buffer);
}

/** As expect(found).toEqual(expected), which takes seconds for a megabyte. */
export function expectBytes(found: Uint8Array, expected: Uint8Array): void {
  expect(found.length).toBe(expected.length);
  expect(found.findIndex((byte, i) => byte !== expected[i])).toBe(-1);
}

export const SEED = Number(process.env.TSVISOR_SEED ?? Math.floor(Math.random() * 2 ** 31));

interface Step {
  readonly what: 'read' | 'write' | 'discard' | 'zero' | 'unmap' | 'flush';
  readonly sector: number;
  readonly count: number;
}

/**
 * What a disk's sectors should hold, and a driver that writes them at random. Requests of one batch are under way
 * together; those that write do not overlap, as of a guest with its wits about it, though they share clusters.
 */
export class DiskModel {
  readonly bytes: Uint8Array;
  /** Sectors that hold anything since they were discarded. */
  readonly #unknown: Uint8Array;
  readonly #random: () => number;

  constructor(bytes: Uint8Array, seed: number) {
    this.bytes = bytes;
    this.#unknown = new Uint8Array(bytes.length / SECTOR);
    this.#random = random(seed);
  }

  /** Makes requests and checks what they bring. */
  run(rig: BlkRig, batches: number): void {
    for (let i = 0; i < batches; i++) this.#batch(rig, 1 + this.#integer(24));
  }

  /** Compares every sector that is known. */
  check(rig: BlkRig): void {
    const step = 128;
    for (let sector = 0; sector < this.#sectors; sector += step) {
      const count = Math.min(step, this.#sectors - sector);
      const { status, data } = rig.read(sector, count * SECTOR);
      if (status !== OK) throw new Error(`reading at sector ${sector}: status ${status}`);
      this.#compare({ what: 'read', sector, count }, data);
    }
  }

  get #sectors(): number {
    return this.bytes.length / SECTOR;
  }

  #integer(below: number): number {
    return Math.floor(this.#random() * below);
  }

  #batch(rig: BlkRig, size: number): void {
    const steps: Step[] = [];
    for (let i = 0; i < size; i++) {
      const step = this.#step();
      const clash = steps.some((other) => {
        const apart = step.sector + step.count <= other.sector || other.sector + other.count <= step.sector;
        return !apart && (step.what !== 'read' || other.what !== 'read');
      });
      if (!clash) steps.push(step);
    }
    const requests = steps.map((step) => this.#request(step));
    const done = rig.requests(requests);
    steps.forEach((step, i) => {
      const completion = done[i];
      const status = statusOf(completion);
      if (status !== OK) throw new Error(`${JSON.stringify(step)}: status ${status === IOERR ? 'IOERR' : status}`);
      if (step.what === 'read') this.#compare(step, (completion as { data: Uint8Array }).data);
      else this.#apply(step, requests[i]?.[1]);
    });
  }

  #step(): Step {
    const dice = this.#random();
    const what =
      dice < 0.35
        ? 'read'
        : dice < 0.75
          ? 'write'
          : dice < 0.83
            ? 'zero'
            : dice < 0.9
              ? 'unmap'
              : dice < 0.97
                ? 'discard'
                : 'flush';
    // Mostly a few sectors, so that requests meet in one cluster; sometimes many; sometimes whole clusters.
    const most = this.#random() < 0.8 ? 20 : 200;
    let sector = this.#integer(this.#sectors);
    let count = 1 + this.#integer(most);
    if (this.#random() < 0.3) {
      sector -= sector % 8;
      count = Math.ceil(count / 8) * 8;
    }
    // The disk's end is a place like no other.
    if (this.#random() < 0.05) sector = this.#sectors - count;
    sector = Math.max(0, sector);
    return { what, sector, count: Math.min(count, this.#sectors - sector) };
  }

  #request({ what, sector, count }: Step): (Uint8Array | number)[] {
    switch (what) {
      case 'read':
        return [header(abi.VIRTIO_BLK_T_IN, sector), ...this.#cut(count * SECTOR), 1];
      case 'write': {
        const data = noise(count * SECTOR, this.#integer(2 ** 31));
        return [header(abi.VIRTIO_BLK_T_OUT, sector), data, 1];
      }
      case 'discard':
        return [header(abi.VIRTIO_BLK_T_DISCARD), range(sector, count), 1];
      case 'zero':
        return [header(abi.VIRTIO_BLK_T_WRITE_ZEROES), range(sector, count), 1];
      case 'unmap':
        return [header(abi.VIRTIO_BLK_T_WRITE_ZEROES), range(sector, count, 1), 1];
      case 'flush':
        return [header(abi.VIRTIO_BLK_T_FLUSH), 1];
    }
  }

  /** One or two buffers of odd length. */
  #cut(length: number): number[] {
    const first = this.#integer(length);
    return first === 0 ? [length] : [first, length - first];
  }

  #apply({ what, sector, count }: Step, data: Uint8Array | number | undefined): void {
    if (what === 'flush') return;
    const [from, to] = [sector * SECTOR, (sector + count) * SECTOR];
    if (what === 'write') this.bytes.set(data as Uint8Array, from);
    if (what === 'zero' || what === 'unmap') this.bytes.fill(0, from, to);
    this.#unknown.fill(what === 'discard' ? 1 : 0, sector, sector + count);
  }

  #compare({ sector, count }: Step, data: Uint8Array): void {
    for (let i = 0; i < count; i++) {
      const found = data.subarray(i * SECTOR, (i + 1) * SECTOR);
      const expected = this.bytes.subarray((sector + i) * SECTOR, (sector + i + 1) * SECTOR);
      if (this.#unknown[sector + i]) {
        // What it held, or zeros; from now on that.
        if (found.some((byte) => byte !== 0) && Buffer.compare(found, expected) !== 0)
          throw new Error(`sector ${sector + i}, discarded, holds what was never there`);
      } else if (Buffer.compare(found, expected) !== 0) {
        const at = found.findIndex((byte, j) => byte !== expected[j]);
        throw new Error(`sector ${sector + i}, byte ${at}: ${found[at]} instead of ${expected[at]}`);
      }
    }
  }
}
