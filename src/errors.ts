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
  | 'ERR_BUILD' // building a guest image failed
  | 'ERR_INTERNAL'; // a defect of tsvisor

/** Base of every error that tsvisor throws on purpose: one line, naming the thing, what is wrong, and the remedy. */
export class TsvisorError extends Error {
  readonly code: ErrorCode;

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
