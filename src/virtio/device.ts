import type { DeviceState } from '../bus/bus.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import type { StateReader } from '../state-reader.js';
import type { Virtqueue } from './queue.js';

/** What a device gets when its driver is ready (DRIVER_OK). It is over with the next reset(). */
export interface VirtioContext {
  readonly memory: GuestMemory;
  /** As many as the device's queueSizes; one that the driver did not set up never has a chain. */
  readonly queues: readonly Virtqueue[];
  /** The negotiated features, as bits. */
  readonly features: bigint;
  /** Tells the driver that the configuration space has changed. */
  configChanged(): void;
  /** The driver did what its device cannot go on from: sets DEVICE_NEEDS_RESET and ends the queues. */
  fail(what: string): void;
}

/**
 * The model of a virtio device, whatever the transport (virtio 1.2); users' devices extend src/device's VirtioDevice. All
 * methods are called on the machine thread and must return promptly; whatever the driver does, none may throw or use more
 * than bounded memory.
 */
export interface VirtioModel {
  /** For messages and statistics. */
  readonly name: string;
  /** Device ID (section 5). */
  readonly type: number;
  /** Greatest number of descriptors of each queue; powers of two up to 32768. */
  readonly queueSizes: readonly number[];
  /** Features of the device itself, as bits; those of the transport and the rings are not its business. */
  readonly features: bigint;
  /** What it did since power-on: numbers by name, for metrics. */
  readonly counters?: object;
  /**
   * Whether a set of features can be worked with, beyond each being offered: the rules of the device's section on bits
   * that require others. Absent: all can.
   */
  acceptsFeatures?(features: bigint): boolean;
  /** Fills `out` from the configuration space; bytes past its end stay as they are. @param offset 0 or more. */
  readConfig(offset: number, out: Uint8Array): void;
  writeConfig?(offset: number, data: Uint8Array): void;
  /** The driver is ready: requests may come from now on, also from before (handleQueue follows for every queue). */
  activate(context: VirtioContext): void;
  /** There may be something in a queue. It may be called without cause. */
  handleQueue(index: number): void;
  /**
   * Back to the state after power-on. Its queues are closed already. A device of which the host may still use guest
   * memory keeps the vCPUs from running until that is over (VcpuHold).
   */
  reset(): void;
  /** What a snapshot must carry of it beyond its queues; absent where there is nothing. No request is under way. */
  save?(): DeviceState;
  /** Takes over what save() gave; after activate(), if its driver was ready. @throws SnapshotError when it cannot be. */
  restore?(state: StateReader): void;
}

/** A feature bit as a set. */
export function feature(bit: number): bigint {
  return 1n << BigInt(bit);
}
