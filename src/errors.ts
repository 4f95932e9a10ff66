import { constants } from 'node:os';

/**
 * Stable identifiers of every failure tsvisor reports; the same strings are in README.md with their exit codes.
 * A program tells failures apart by these, never by the message.
 */
export type ErrorCode =
  | 'ERR_USAGE' // a bad option, value or configuration field
  | 'ERR_KVM_MISSING' // there is no /dev/kvm
  | 'ERR_KVM_PERMISSION' // this user may not open /dev/kvm
  | 'ERR_KVM_UNSUPPORTED' // /dev/kvm is there but lacks something tsvisor needs
  | 'ERR_KVM' // a KVM ioctl failed
  | 'ERR_IMAGE' // a kernel or initrd is missing, unreadable or not what it should be
  | 'ERR_DRIVE' // a drive's image is missing, in use or not what it should be
  | 'ERR_NETWORK' // a tap, port or other network resource that cannot be had
  | 'ERR_MEMORY' // the machine does not fit its memory, or the host has none left
  | 'ERR_OUTPUT' // a file that tsvisor should write cannot be written
  | 'ERR_GUEST_INSTRUCTION' // the guest executed something that nothing here can complete
  | 'ERR_MACHINE_STATE' // the machine is not in a state in which that can be done
  | 'ERR_MACHINE_ENDED' // the machine ended while something was under way in it
  | 'ERR_MACHINE_CRASHED' // the machine thread died
  | 'ERR_MACHINE_NOT_FOUND' // there is no machine of that name
  | 'ERR_GUEST_PANIC' // the guest's kernel panicked
  | 'ERR_VSOCK' // a vsock connection was refused, reset or took too long
  | 'ERR_AGENT' // the guest's agent is missing, of another version, or broke its protocol
  | 'ERR_AGENT_TIMEOUT' // the guest's agent does not answer
  | 'ERR_EXEC' // a program could not be started in the guest
  | 'ERR_GUEST_FILE' // a file operation failed in the guest
  | 'ERR_TIMEOUT' // it took longer than the caller allows
  | 'ERR_DEVICE' // a user's device cannot be loaded or broke its contract
  | 'ERR_SNAPSHOT' // a snapshot cannot be made, or is damaged, of another version or of another host
  | 'ERR_MIGRATION' // a machine could not be moved to another process
  | 'ERR_BUILD' // a guest image cannot be built, or the native addon is not compiled
  | 'ERR_INTERNAL'; // a defect of tsvisor

/** Base of every error that tsvisor throws on purpose: one line, naming the thing, what is wrong, and the remedy. */
export class TsvisorError extends Error {
  readonly code: ErrorCode;
  /** The last lines of the guest's console, where a guest has to do with it. The guest chose them. */
  declare console?: string;

  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
    this.code = code;
  }
}

/** A bad option or configuration field. */
export class UsageError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_USAGE', message, options);
  }
}

/** A kernel or initrd that cannot be booted. */
export class ImageError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_IMAGE', message, options);
  }
}

/** A drive's image that cannot be used. */
export class DriveError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_DRIVE', message, options);
  }
}

/** A network resource of the host that cannot be had. */
export class NetworkError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_NETWORK', message, options);
  }
}

/** A guest that does not fit its memory, or memory that the host does not have. */
export class MemoryError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_MEMORY', message, options);
  }
}

/** A machine that ended, or whose thread died, while something was under way in it. */
export class MachineError extends TsvisorError {
  constructor(
    code: 'ERR_MACHINE_ENDED' | 'ERR_MACHINE_CRASHED' | 'ERR_GUEST_PANIC',
    message: string,
    options?: ErrorOptions,
  ) {
    super(code, message, options);
  }
}

/** A vsock connection that was refused, reset or took too long. */
export class VsockError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_VSOCK', message, options);
  }
}

/** A guest's agent that is missing, does not answer, or cannot be understood. */
export class AgentError extends TsvisorError {
  constructor(message: string, code: 'ERR_AGENT' | 'ERR_AGENT_TIMEOUT' = 'ERR_AGENT', options?: ErrorOptions) {
    super(code, message, options);
  }
}

/** What the guest's kernel refused the agent: starting a program, or a file operation. */
export class GuestError extends TsvisorError {
  /** The name of the errno, as `ENOENT`. */
  readonly errno: string;

  constructor(code: 'ERR_EXEC' | 'ERR_GUEST_FILE', errno: string, message: string, options?: ErrorOptions) {
    super(code, message, options);
    this.errno = errno;
  }
}

/** A user's device that cannot be loaded or broke its contract. */
export class DeviceError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_DEVICE', message, options);
  }
}

/** A snapshot that cannot be made, or that is damaged, of another version or of another host. */
export class SnapshotError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    // Somebody else may have chosen names in it.
    // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what it is about
    super('ERR_SNAPSHOT', message.replace(/[\u0000-\u001f\u007f-\u009f]/g, '?'), options);
  }
}

/** A machine that could not be moved to another process; where it runs now, its message says. */
export class MigrationError extends TsvisorError {
  constructor(message: string, options?: ErrorOptions) {
    super('ERR_MIGRATION', message, options);
  }
}

/** A failed system call, usually a KVM ioctl. */
export class KvmError extends TsvisorError {
  /** The positive errno, e.g. 22. */
  readonly errno: number;
  /** The name of the ioctl or system call, e.g. `KVM_SET_SREGS`. */
  readonly ioctl: string;

  constructor(ioctl: string, errno: number, purpose: string, code: ErrorCode = 'ERR_KVM') {
    super(code, `${ioctl} failed with ${errnoName(errno)} while ${purpose}`);
    this.errno = errno;
    this.ioctl = ioctl;
  }
}

const errnoNames = new Map(Object.entries(constants.errno).map(([name, value]) => [value, name]));

/** `ENOENT` for 2. */
export function errnoName(errno: number): string {
  return errnoNames.get(errno) ?? `errno ${errno}`;
}

/** An error as plain data, to cross from the machine thread to the main thread. */
export interface ErrorData {
  readonly name: string;
  readonly code: ErrorCode;
  readonly message: string;
  readonly stack?: string | undefined;
}

/** Turns anything thrown into plain data; what is not a TsvisorError is a defect of ours and keeps its stack. */
export function errorToData(error: unknown): ErrorData {
  if (error instanceof TsvisorError) return { name: error.name, code: error.code, message: error.message };
  const { message, stack } = error instanceof Error ? error : new Error(String(error));
  return { name: 'TsvisorError', code: 'ERR_INTERNAL', message, stack };
}

/** The reverse of errorToData. */
export function errorFromData(data: ErrorData): TsvisorError {
  const error = new TsvisorError(data.code, data.message);
  error.name = data.name;
  if (data.stack) error.stack = data.stack;
  return error;
}
