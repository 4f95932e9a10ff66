import type { Duplex } from 'node:stream';
import { MigrationError } from '../errors.js';
import { FRAME_LIMITS, FrameType, PROTOCOL_VERSION, printable } from './frames.js';

const HEADER = 8;
const NOTHING = Buffer.alloc(0);

export interface Frame {
  readonly type: FrameType;
  readonly payload: Buffer;
}

/** The connection ended, or nothing came of it in time: it says nothing of the other side. */
export class ConnectionLost extends MigrationError {}

/** The other side said that it does not go on. */
export class Refusal extends MigrationError {}

/** Frames to and from the other side of a migration, which may send anything. */
export class FrameChannel {
  readonly #socket: Duplex;
  readonly #timeout: number;
  /** Why nothing comes any more. */
  #reason: Error | undefined;
  readonly #header = Buffer.alloc(HEADER);
  /** Of the frame that comes: bytes that are there, header included. */
  #received = 0;
  #payload = NOTHING;
  readonly #frames: Frame[] = [];
  /** What waits for the socket. */
  readonly #waiting = new Set<(happened: 'frame' | 'drain' | Error) => void>();

  /** @param timeout milliseconds in which something of what is waited for must happen. */
  constructor(socket: Duplex, timeout: number) {
    this.#socket = socket;
    this.#timeout = timeout;
    socket.on('error', (error: NodeJS.ErrnoException) => {
      this.#fail(new ConnectionLost(`the connection was lost (${error.code ?? error.message})`, { cause: error }));
    });
    socket.on('data', (chunk: Buffer) => this.#take(chunk));
    socket.on('end', () => this.#fail(lost()));
    socket.on('close', () => this.#fail(lost()));
  }

  /** The next frame, of one of these types. @throws Refusal, ConnectionLost, MigrationError, or destroy()'s reason. */
  async next(...types: FrameType[]): Promise<Frame> {
    while (this.#frames.length === 0) {
      if (this.#reason) throw this.#reason;
      await this.#until('frame');
    }
    const { type, payload } = this.#frames.shift() as Frame;
    if (this.#frames.length === 0) this.#socket.resume();
    if (type === FrameType.refused) throw new Refusal(printable(payload));
    if (!types.includes(type)) throw violation(`a frame of type ${type}, which does not belong there`);
    return { type, payload };
  }

  /** Sends a frame. Resolves when there is room for more. @throws as next() */
  async send(type: FrameType, payload?: Uint8Array): Promise<void> {
    const socket = this.#socket;
    if (socket.destroyed) throw this.#reason ?? lost();
    const header = Buffer.alloc(HEADER);
    header.writeUInt32LE(type, 0);
    header.writeUInt32LE(payload?.length ?? 0, 4);
    socket.cork();
    let room = socket.write(header);
    if (payload && payload.length > 0) room = socket.write(payload);
    socket.uncork();
    if (!room) await this.#until('drain');
  }

  /** Sends a frame. Resolves when it is the kernel's: it goes on its way even if this process is killed now. */
  sendNow(type: FrameType): Promise<void> {
    const header = Buffer.alloc(HEADER);
    header.writeUInt32LE(type, 0);
    return new Promise((resolve, reject) => {
      this.#socket.write(header, (error) => (error ? reject(this.#reason ?? lost()) : resolve()));
    });
  }

  /** Tells the other side why this one does not go on, if it can still be told, and ends the connection. */
  async refuse(why: string): Promise<void> {
    try {
      await this.send(FrameType.refused, Buffer.from(why).subarray(0, FRAME_LIMITS[FrameType.refused]));
      this.end();
    } catch {
      this.destroy();
    }
  }

  /** Nothing more is sent; what was sent arrives. */
  end(): void {
    this.#reason ??= lost();
    this.#socket.end();
    this.#socket.resume(); // whatever still comes is not awaited
    const timer = setTimeout(() => this.#socket.destroy(), this.#timeout);
    timer.unref();
    this.#socket.once('close', () => clearTimeout(timer));
  }

  destroy(reason?: Error): void {
    this.#frames.length = 0;
    this.#fail(reason ?? lost());
    this.#socket.destroy();
  }

  #take(chunk: Buffer): void {
    for (let at = 0; at < chunk.length && !this.#reason; ) {
      if (this.#received < HEADER) {
        const copied = chunk.copy(this.#header, this.#received, at);
        at += copied;
        this.#received += copied;
        if (this.#received < HEADER) return;
        const type = this.#header.readUInt32LE(0);
        const length = this.#header.readUInt32LE(4);
        if (length > (FRAME_LIMITS[type as FrameType] ?? -1)) {
          this.#fail(violation(`a frame of type ${type} and ${length} bytes`));
          return;
        }
        this.#payload = length === 0 ? NOTHING : Buffer.allocUnsafe(length);
      } else {
        const copied = chunk.copy(this.#payload, this.#received - HEADER, at);
        at += copied;
        this.#received += copied;
      }
      if (this.#received < HEADER + this.#payload.length) continue;
      this.#frames.push({ type: this.#header.readUInt32LE(0) as FrameType, payload: this.#payload });
      this.#received = 0;
      this.#payload = NOTHING;
      this.#socket.pause(); // until it is asked for
      for (const settle of [...this.#waiting.values()]) settle('frame');
    }
  }

  /** The first reason counts. */
  #fail(reason: Error): void {
    this.#reason ??= reason;
    for (const settle of [...this.#waiting.values()]) settle(this.#reason);
  }

  /** Resolves with the next frame, or when the socket has room. */
  #until(what: 'frame' | 'drain'): Promise<void> {
    return new Promise((resolve, reject) => {
      const settle = (happened: 'frame' | 'drain' | Error) => {
        if (!(happened instanceof Error) && happened !== what) return;
        clearTimeout(timer);
        this.#waiting.delete(settle);
        this.#socket.off('drain', drained);
        if (happened instanceof Error) reject(happened);
        else resolve();
      };
      const drained = () => settle('drain');
      const timer = setTimeout(() => settle(late()), this.#timeout);
      const late = () => new ConnectionLost(`the other side has not answered for ${this.#timeout} ms`);
      this.#waiting.add(settle);
      this.#socket.on('drain', drained);
    });
  }
}

function lost(): ConnectionLost {
  return new ConnectionLost('the connection was lost');
}

/** The other side broke the protocol. */
export function violation(what: string): MigrationError {
  return new MigrationError(`the other side sent ${what}`);
}

/** What follows the version at a body's start. @throws MigrationError for another version */
export function unversioned(body: Buffer): Buffer {
  if (body.length < 4) throw violation('a greeting without a version');
  const version = body.readUInt32LE(0);
  if (version !== PROTOCOL_VERSION) {
    const both = `version ${version} of the protocol, and this tsvisor version ${PROTOCOL_VERSION}`;
    throw new MigrationError(`the other side speaks ${both}; use the same tsvisor on both`);
  }
  return body.subarray(4);
}
