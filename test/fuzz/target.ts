import type { VirtioModel } from '#dist/virtio/device.js';
import type { Random } from '../kvm/assist/random.js';
import type { FuzzMachine, Limits, Memory } from './machine.js';

/** What a driver asks for: bytes for the device, and how many it may write. */
export interface Request {
  readonly out: Uint8Array;
  readonly in: number;
}

/** The device of one case, with all that its host does. */
export interface Subject {
  readonly device: VirtioModel;
  /**
   * Comes to rest, so that the machine can be saved. @returns `device` from now on: another one of the same kind, as
   * after power-on. Absent: this one is not saved.
   */
  renew?(): VirtioModel;
  /** The machine around the device is there now. @param lawful its driver keeps to the rules. */
  attach?(machine: FuzzMachine, lawful: boolean): void;
  /** A queue that is worth using. */
  queue(random: Random): number;
  /** A request that the device could take for a good one, in one of its queues. */
  request(random: Random, queue: number): Request;
  /** Fields of the configuration space that a driver may write, by offset. */
  readonly writableConfig?: readonly number[];
  /** Something happens on the host: a timer, a packet, the end of an operation. @returns what. */
  hostEvent(random: Random): string;
  /** The host does what it still has to do, and fails no more. @returns whether there may be more. */
  settle(): boolean;
  /** Whether the device serves every request of a queue, whatever comes from the host. */
  serves(queue: number): boolean;
  /** Whether the vCPUs are held. The host's events go on until they are not. */
  readonly held?: boolean;
  /** The driver was initialized again, and all went well: the device must still work. @throws Error when it does not. */
  probe(machine: FuzzMachine): void;
  /** The case is over. @throws Violation */
  end?(): void;
}

/** A kind of device, or one of its queues. */
export interface Target {
  readonly name: string;
  readonly limits: Limits;
  subject(random: Random, memory: Memory): Subject;
  dispose?(): void;
}
