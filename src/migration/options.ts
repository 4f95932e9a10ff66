import { UsageError } from '../errors.js';

/** How far a migration is. */
export interface MigrationProgress {
  /**
   * `connect`, then `pre-copy`: memory is copied while the guest runs; `stop-and-copy`: it stands still for the rest;
   * `confirm`: the target is about to run it.
   */
  readonly phase: 'connect' | 'pre-copy' | 'stop-and-copy' | 'confirm';
  /** Of pre-copy, from 1; the last one's number afterwards. */
  readonly round: number;
  /** Bytes of memory that were sent, or received. */
  readonly bytesSent: number;
  /** Bytes of guest memory that this round still has to copy; 0 at a target, which does not know. */
  readonly bytesRemaining: number;
  /** What the guest wrote in the round before, at the source. */
  readonly dirtyPagesPerSecond?: number;
}

/** What a migration took, seen from the source. */
export interface MigrationResult {
  /** Milliseconds from the guest's stop here until the target said that it runs. */
  readonly downtimeMs: number;
  readonly totalMs: number;
  /** Of pre-copy. */
  readonly rounds: number;
  /** Bytes of memory that were sent. */
  readonly bytes: number;
}

/** What both sides of a migration are told. */
export interface MigrationCommon {
  /**
   * A secret that both sides have, 16 bytes or more, as random as a key has to be. It proves each side to the other and
   * encrypts what goes between them.
   */
  readonly key: string | Uint8Array;
  /** Milliseconds without a word from the other side after which it counts as lost, 100 to 2^31 - 1; default 10000. */
  readonly timeout?: number;
  /** Told how far it is, now and then. */
  readonly onProgress?: (progress: MigrationProgress) => void;
}

/** How to move a machine. */
export interface MigrateOptions extends MigrationCommon {
  /**
   * Gives up when it aborts; the machine goes on here. migrate() then rejects with its reason. Too late once the target is
   * about to run the machine.
   */
  readonly signal?: AbortSignal;
  /**
   * Milliseconds that the guest should stand still at most, 1 to 2^31 - 1; default 300. Memory is copied again and again
   * until what is left can go in half of that at the rate measured, or this does not get nearer. It is no promise.
   */
  readonly maxDowntime?: number;
}

export const DEFAULT_TIMEOUT = 10_000;
export const DEFAULT_DOWNTIME = 300;
const MIN_TIMEOUT = 100;

/** @throws UsageError that names the option. */
export function checkMilliseconds(name: string, value: number, minimum = MIN_TIMEOUT): number {
  if (Number.isFinite(value) && value >= minimum && value < 2 ** 31) return value;
  throw new UsageError(`${name}: ${value} is not ${minimum} to 2^31 - 1 ms`);
}
