import { AgentError, UsageError } from '../errors.js';

/** docs/agent-protocol.md has what these mean; guest-images/agent/protocol.h has the same numbers. */
export const PROTOCOL_VERSION = 1;
/** The agent listens here in the guest, and connects here to the host to say that it is there. Privileged in the guest. */
export const AGENT_PORT = 1007;

export const HEADER_SIZE = 8;
/** Bytes of the longest payload. */
export const MAX_PAYLOAD = 160 * 1024;
/** Bytes of file contents or of a stream that a frame carries. */
export const MAX_DATA = 32 * 1024;
/** Bytes of a path or a name. */
export const MAX_PATH = 4095;
/** Bytes of arguments and environment together, each string with its zero. */
export const MAX_ARGUMENTS = 128 * 1024;
/** Folders within folders in a copied tree. */
export const MAX_DEPTH = 256;
/** Bytes of stdin that may be under way at first; CREDIT allows more. */
export const STDIN_WINDOW = 64 * 1024;
/** The same for stdout, and for stderr. */
export const OUTPUT_WINDOW = 256 * 1024;

export const FrameType = {
  hello: 1,
  ok: 2,
  error: 3,
  data: 4,
  end: 5,
  entry: 6,
  leave: 7,

  exec: 0x10,

  read: 0x20,
  write: 0x21,
  list: 0x22,
  stat: 0x23,
  mkdir: 0x24,
  remove: 0x25,
  pack: 0x26,
  unpack: 0x27,

  ping: 0x30,
  shutdown: 0x31,
  setTime: 0x32,
  renew: 0x33,

  started: 0x40,
  stdin: 0x41,
  stdout: 0x42,
  stderr: 0x43,
  stdinClosed: 0x44,
  credit: 0x45,
  signal: 0x46,
  resize: 0x47,
  exit: 0x48,
  terminate: 0x49,
} as const;

export const ExecFlag = { tty: 1, detached: 2 } as const;
export const StatFlag = { noFollow: 1 } as const;
export const MkdirFlag = { parents: 1 } as const;
export const RemoveFlag = { recursive: 1, force: 2 } as const;
export const WriteFlag = { hasMode: 1 } as const;
export const RenewFlag = { random: 1, time: 2 } as const;

/** Bytes of the seed that RENEW carries. */
export const SEED_SIZE = 64;

export interface Frame {
  readonly type: number;
  readonly payload: Buffer;
}

/** A violation of the protocol by the guest. */
export function violation(what: string): AgentError {
  return new AgentError(`the guest's agent broke its protocol: ${what}`);
}

/** Builds a frame. */
export class FrameWriter {
  readonly #type: number;
  readonly #parts: Uint8Array[] = [];

  constructor(type: number) {
    this.#type = type;
  }

  u32(value: number): this {
    const part = Buffer.alloc(4);
    part.writeUInt32LE(value >>> 0);
    this.#parts.push(part);
    return this;
  }

  u64(value: bigint): this {
    const part = Buffer.alloc(8);
    part.writeBigUInt64LE(BigInt.asUintN(64, value));
    this.#parts.push(part);
    return this;
  }

  bytes(value: Uint8Array): this {
    this.#parts.push(value);
    return this;
  }

  /** Text without NUL, or the bytes of a name. @param what names it in the UsageError. */
  string(value: string | Uint8Array, what: string, limit = MAX_PATH): this {
    if (typeof value !== 'string' && !(value instanceof Uint8Array)) throw new UsageError(`${what}: must be text`);
    const bytes = Buffer.from(value as Uint8Array);
    if (bytes.includes(0)) throw new UsageError(`${what}: contains a NUL character`);
    if (bytes.length > limit) throw new UsageError(`${what}: has ${bytes.length} bytes; at most ${limit} are possible`);
    this.#parts.push(bytes, ZERO);
    return this;
  }

  /** A file's path: not empty. */
  path(value: string, what = 'path'): this {
    if (value === '') throw new UsageError(`${what}: is empty`);
    return this.string(value, what);
  }

  frame(): Buffer {
    return encodeFrame(this.#type, ...this.#parts);
  }
}

const ZERO = Buffer.alloc(1);

export function encodeFrame(type: number, ...parts: readonly Uint8Array[]): Buffer {
  const header = Buffer.alloc(HEADER_SIZE);
  header.writeUInt32LE(
    parts.reduce((sum, part) => sum + part.length, 0),
    0,
  );
  header.writeUInt32LE(type, 4);
  return Buffer.concat([header, ...parts]);
}

/** Reads a payload field by field. @throws AgentError when the guest sent less, or, from end(), more. */
export class PayloadReader {
  readonly #payload: Buffer;
  #at = 0;

  constructor(payload: Buffer) {
    this.#payload = payload;
  }

  u32(): number {
    return this.#take(4).readUInt32LE();
  }

  u64(): bigint {
    return this.#take(8).readBigUInt64LE();
  }

  i64(): bigint {
    return this.#take(8).readBigInt64LE();
  }

  /** The bytes of a string: names need not be UTF-8. */
  bytes(): Buffer {
    const end = this.#payload.indexOf(0, this.#at);
    if (end < 0) throw violation('a string without an end');
    if (end - this.#at > MAX_PATH) throw violation('a string that is too long');
    return this.#take(end + 1 - this.#at).subarray(0, -1);
  }

  string(): string {
    return this.bytes().toString();
  }

  end(): void {
    if (this.#at !== this.#payload.length) throw violation('a frame that is too long');
  }

  #take(size: number): Buffer {
    const end = this.#at + size;
    if (end > this.#payload.length) throw violation('a frame that is too short');
    const part = this.#payload.subarray(this.#at, end);
    this.#at = end;
    return part;
  }
}
