import { type ErrorCode, errorToData, GuestError } from '../errors.js';
import type { EndReason } from '../machine/end.js';

/**
 * What `tsvisor` exits with. A guest that names its own code (debug-exit port) chooses freely; ours follow sysexits.h,
 * timeout(1) and the shell's 128 + signal. README.md has the same table.
 */
export const ERROR_EXIT: Readonly<Record<ErrorCode, number>> = {
  ERR_INTERNAL: 70,
  ERR_USAGE: 64,
  ERR_IMAGE: 66,
  ERR_MEMORY: 71,
  ERR_DRIVE: 72,
  ERR_OUTPUT: 73,
  ERR_NETWORK: 74,
  ERR_KVM_MISSING: 69,
  ERR_KVM_UNSUPPORTED: 69,
  ERR_KVM_PERMISSION: 77,
  ERR_KVM: 82,
  ERR_GUEST_INSTRUCTION: 83,
  ERR_MACHINE_STATE: 70,
  ERR_BUILD: 75,
  ERR_MACHINE_ENDED: 70,
  ERR_MACHINE_CRASHED: 70,
  ERR_MACHINE_NOT_FOUND: 68,
  ERR_GUEST_PANIC: 84,
  ERR_VSOCK: 76,
  ERR_AGENT: 76,
  ERR_AGENT_TIMEOUT: 76,
  ERR_EXEC: 127,
  ERR_GUEST_FILE: 1,
  ERR_TIMEOUT: 124,
  ERR_DEVICE: 78,
  ERR_SNAPSHOT: 79,
  ERR_MIGRATION: 85,
};

/** For a machine that ended; `guest-exit` uses the guest's code, `stopped` depends on who stopped it. */
export const END_EXIT: Readonly<Record<Exclude<EndReason, 'guest-exit' | 'stopped'>, number>> = {
  'guest-shutdown': 0,
  migrated: 0,
  'guest-reset': 80,
  'guest-panic': 84,
  'drive-failure': 72,
  'page-source-failure': 79,
  'triple-fault': 81,
  'kvm-failure': 82,
  'guest-instruction': 83,
};

export const TIMEOUT_EXIT = 124;
export const ESCAPE_EXIT = 0;
export const CLOSED_STDOUT_EXIT = 141;

/** The shell's convention for a process that a signal ended. */
export const SIGNAL_EXIT = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const;

/** For what a command threw. As in a shell, 126 is a program that is there but cannot be run. */
export function exitCodeOf(error: unknown): number {
  if (error instanceof GuestError && error.code === 'ERR_EXEC' && error.errno !== 'ENOENT') return 126;
  return ERROR_EXIT[errorToData(error).code];
}
