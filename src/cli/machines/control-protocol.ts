import type { ErrorData } from '../../errors.js';
import type { EndReason } from '../../machine/end.js';
import type { MigrationProgress, MigrationResult } from '../../migration/options.js';
import type { SnapshotInfo, SnapshotOptions } from '../../snapshot/take.js';

/**
 * The protocol of a machine's control.sock: JSON, one object a line, UTF-8. A client sends a request and gets one answer
 * before it sends the next, of some methods with progress before it; when it ends its side meanwhile, what it asked for is given up, where that can be. After the answer to `console` the connection carries the console's bytes, both ways.
 */
export const CONTROL_VERSION = 1;

/** Bytes of a line, its end included. */
export const MAX_LINE = 16 * 1024;
/** Connections at a time; more are closed at once. */
export const MAX_CLIENTS = 64;
/** How long a client may be silent while it is owed nothing, in milliseconds. */
export const IDLE_MS = 10_000;
/** How long a machine may take to answer what it answers at once, and to give up what it can, in milliseconds. */
export const ANSWER_MS = 5000;

/** What each method takes and gives. */
export interface ControlMethods {
  status: { params: Record<string, never>; result: MachineStatus };
  /** Answered when the machine has ended. */
  wait: { params: Record<string, never>; result: Ended };
  /** Answered when the guest's agent has said hello; how long to wait for that in milliseconds. */
  ready: { params: { timeout: number }; result: Record<string, never> };
  /**
   * Ends the machine, and is answered when it has ended: the agent powers it off, or after this many milliseconds, or at
   * once with `force` or without an agent, its power is cut.
   */
  stop: { params: { timeout: number; force: boolean }; result: Ended };
  /** Writes a snapshot to a folder, given by its whole path. */
  snapshot: {
    params: { folder: string } & Required<Omit<SnapshotOptions, 'signal'>>;
    result: SnapshotInfo;
  };
  /** Moves the machine to another process, which has the same key, in base64; Machine.migrate(). Its progress is told. */
  migrate: { params: { address: string; key: string; maxDowntime: number }; result: MigrationResult };
  /** Joins the console. */
  console: { params: Record<string, never>; result: Record<string, never> };
  /** Tells the guest the size of the console's terminal, if it has one. */
  resize: { params: { rows: number; columns: number }; result: Record<string, never> };
}

export type ControlMethod = keyof ControlMethods;

export interface MachineStatus {
  readonly name: string;
  readonly pid: number;
  readonly state: string;
  /** Milliseconds since the guest was started. */
  readonly uptime: number;
  /** Bytes of guest RAM. */
  readonly memory: number;
  readonly cpus: number;
  /** Path, or `default`. */
  readonly kernel: string;
  /** Path of the snapshot that it goes on from, if it does. */
  readonly snapshot?: string;
  /** Whether the guest was given the agent. */
  readonly agent: boolean;
  /** Whether there is a console to join. */
  readonly console: boolean;
  /** Path of the hybrid vsock's Unix socket. */
  readonly vsock: string;
  readonly detached: boolean;
}

export interface Ended {
  /** One line for a person. */
  readonly message: string;
  /** What the machine's process exits with. */
  readonly exitCode: number;
  /** `stopped` when its power was cut. */
  readonly reason: EndReason;
}

export interface ControlRequest {
  readonly version: number;
  readonly method: ControlMethod;
  readonly params: unknown;
}

export type ControlAnswer =
  | { readonly result: unknown }
  | { readonly error: ErrorData }
  | { readonly progress: MigrationProgress };
