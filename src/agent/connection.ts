import { once } from 'node:events';
import type { Duplex } from 'node:stream';
import { AgentError, TsvisorError } from '../errors.js';
import {
  type Frame,
  FrameType,
  FrameWriter,
  HEADER_SIZE,
  MAX_PAYLOAD,
  PayloadReader,
  PROTOCOL_VERSION,
  STDIN_WINDOW,
  violation,
} from './protocol.js';

/** Opens a byte stream to the guest's agent: one for each operation. */
export type Connect = (signal?: AbortSignal) => Promise<Duplex>;

/** How to reach the agent, and the milliseconds that it has to take a request. */
export interface Channel {
  readonly connect: Connect;
  readonly timeout: number;
  /** Resolves when the agent can be connected to; what it waits for is not the agent's time. */
  readonly ready?: ((signal: AbortSignal | undefined) => Promise<void>) | undefined;
}

/** What the agent says of itself. */
export interface AgentHello {
  readonly protocolVersion: number;
  /** The version of tsvisor that the agent came with. */
  readonly agentVersion: string;
}

/** Milliseconds that the agent has for an answer; where a guest's kernel is interpreted a fork alone may take 100. */
export const DEFAULT_ANSWER_TIMEOUT = 30_000;

/** Bytes of frames that may wait for an agent that does not read: a window of stdin, and thousands of small ones. */
const MAX_BACKLOG = STDIN_WINDOW + 64 * 1024;

/** The frames of one connection. Whoever has it destroys it. */
export class Connection implements Disposable {
  readonly #stream: Duplex;
  readonly #chunks: AsyncIterator<Uint8Array>;
  #received: Buffer = Buffer.alloc(0);
  /** Of the stream. */
  #error: unknown;
  /** Of destroy(). */
  #reason: unknown;
  readonly #signal: AbortSignal | undefined;
  readonly #abort = () => this.destroy(this.#signal?.reason);

  /** @param signal destroys it, with its reason, until release() */
  constructor(stream: Duplex, signal?: AbortSignal) {
    this.#stream = stream;
    // An error of the stream reaches whoever waits for it; nobody waiting must not end the process.
    stream.on('error', (error) => {
      this.#error ??= error;
    });
    this.#signal = signal;
    signal?.addEventListener('abort', this.#abort, { once: true });
    if (signal?.aborted) this.#abort();
    this.#chunks = stream[Symbol.asyncIterator]();
  }

  /** The next frame; undefined at the end of the connection. @throws AgentError, or what the stream was destroyed with. */
  async receive(): Promise<Frame | undefined> {
    try {
      if (!(await this.#fill(HEADER_SIZE))) return undefined;
      const length = this.#received.readUInt32LE(0);
      const type = this.#received.readUInt32LE(4);
      if (length > MAX_PAYLOAD) throw violation(`a frame of ${length} bytes`);
      if (!(await this.#fill(HEADER_SIZE + length))) throw lost();
      const payload = this.#received.subarray(HEADER_SIZE, HEADER_SIZE + length);
      this.#received = this.#received.subarray(HEADER_SIZE + length);
      return { type, payload };
    } catch (error) {
      throw this.#failure(error);
    }
  }

  /** The next frame, which must be there. */
  async expect(): Promise<Frame> {
    const frame = await this.receive();
    if (!frame) throw lost();
    return frame;
  }

  /** Resolves when there is room for more. */
  async send(frame: Uint8Array): Promise<void> {
    if (this.#stream.destroyed) throw this.#failure(this.#error ?? lost());
    if (this.#stream.write(frame)) return;
    const closed = new AbortController();
    const onClose = () => closed.abort();
    this.#stream.once('close', onClose);
    try {
      await once(this.#stream, 'drain', { signal: closed.signal });
    } catch {
      throw this.#failure(this.#error ?? lost());
    } finally {
      this.#stream.off('close', onClose);
    }
  }

  /** Sends a small frame without waiting for room. An agent that takes none of them loses the connection. */
  post(frame: Uint8Array): void {
    if (this.#stream.destroyed) return; // whoever receives learns of it
    this.#stream.write(frame);
    if (this.#stream.writableLength > MAX_BACKLOG) this.destroy(violation('it does not read what it is sent'));
  }

  /** Ends everything under way here, with this reason. */
  destroy(error?: unknown): void {
    this.#reason ??= error;
    this.release();
    this.#stream.destroy();
  }

  /** The signal is not about this connection any more. */
  release(): void {
    this.#signal?.removeEventListener('abort', this.#abort);
  }

  [Symbol.dispose](): void {
    this.destroy();
  }

  /** Takes in bytes until so many are there. False if the stream ended before the first of them. */
  async #fill(size: number): Promise<boolean> {
    if (this.#received.length >= size) return true;
    const parts = [this.#received];
    let length = this.#received.length;
    while (length < size) {
      const { value, done } = await this.#chunks.next();
      if (done) {
        if (this.#error) throw this.#error;
        if (length > 0) throw lost();
        return false;
      }
      parts.push(Buffer.from(value.buffer, value.byteOffset, value.byteLength));
      length += value.length;
    }
    this.#received = Buffer.concat(parts);
    return true;
  }

  /** What to throw: the reason of destroy(), then what is ours to begin with, as the machine's end. */
  #failure(error: unknown): unknown {
    if (this.#reason !== undefined) return this.#reason;
    const reason = this.#error ?? error;
    return reason instanceof TsvisorError ? reason : lost(reason);
  }
}

function lost(cause?: unknown): AgentError {
  return new AgentError("the connection to the guest's agent was lost", 'ERR_AGENT', cause ? { cause } : undefined);
}

/**
 * Opens a connection and has the agent take a request.
 * @param frame the request; a function for one that tells the time: it is called when the agent waits for it
 * @param signal ends it with its reason, for as long as the connection is used
 * @throws AgentError ERR_AGENT without an agent, or one of another version; ERR_AGENT_TIMEOUT; signal.reason
 */
export async function request(
  { connect, timeout, ready }: Channel,
  frame: Uint8Array | (() => Uint8Array),
  signal: AbortSignal | undefined,
): Promise<Connection> {
  signal?.throwIfAborted();
  await ready?.(signal);
  const late = new AbortController();
  const timer = setTimeout(() => {
    late.abort(new AgentError(`the guest's agent did not answer in ${timeout} ms`, 'ERR_AGENT_TIMEOUT'));
  }, timeout);
  const either = signal ? AbortSignal.any([signal, late.signal]) : late.signal;
  let connection: Connection | undefined;
  try {
    connection = new Connection(await connectOrAbort(connect, either), either);
    const later = typeof frame === 'function';
    await connection.send(later ? helloFrame : Buffer.concat([helloFrame, frame]));
    readHello(await connection.receive());
    if (later) await connection.send(frame());
    return connection;
  } catch (error) {
    connection?.destroy();
    either.throwIfAborted();
    throw withoutAgent(error);
  } finally {
    clearTimeout(timer);
  }
}

/** A connection that comes after the abort is closed. */
function connectOrAbort(connect: Connect, signal: AbortSignal): Promise<Duplex> {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const onAbort = () => reject(signal.reason);
    signal.addEventListener('abort', onAbort, { once: true });
    connect(signal)
      .then((stream) => {
        if (!signal.aborted) return resolve(stream);
        stream.on('error', () => {});
        stream.destroy();
      }, reject)
      .finally(() => signal.removeEventListener('abort', onAbort));
  });
}

/** What connect() throws when nobody listens in the guest. */
function withoutAgent(error: unknown): unknown {
  const code = error instanceof Error && 'code' in error ? error.code : undefined;
  if (code !== 'ERR_VSOCK' && code !== 'ECONNREFUSED') return error;
  return new AgentError(
    'the guest has no agent, or it is not ready yet; wait for it, or give the machine one with agent: true',
    'ERR_AGENT',
    { cause: error },
  );
}

const helloFrame = new FrameWriter(FrameType.hello).u32(PROTOCOL_VERSION).string('', 'version').frame();

function readHello(frame: Frame | undefined): AgentHello {
  if (!frame || frame.type !== FrameType.hello) throw violation('no hello');
  const payload = new PayloadReader(frame.payload);
  const protocolVersion = payload.u32();
  if (protocolVersion !== PROTOCOL_VERSION) {
    throw new AgentError(
      `the guest's agent speaks version ${protocolVersion} of its protocol, and this tsvisor version ${PROTOCOL_VERSION}; ` +
        'boot the guest anew',
    );
  }
  const agentVersion = payload.string();
  payload.end();
  return { protocolVersion, agentVersion };
}

/** The agent's own connection to the host, which tells that it is ready. */
export interface Greeting extends AgentHello {
  /** Resolves when the connection is over: the agent or the guest is gone, or the guest was restored elsewhere. */
  readonly closed: Promise<void>;
}

/**
 * Reads what the agent says on the connection that it makes to the host's AGENT_PORT when it is ready. The host leaves it
 * open; `stream.destroy()` closes it. Whoever accepts it checks first that it comes from a privileged port (below 1024).
 * @param timeout milliseconds. @throws AgentError if it is anything else; the stream is then destroyed.
 */
export async function readGreeting(stream: Duplex, timeout = DEFAULT_ANSWER_TIMEOUT): Promise<Greeting> {
  const connection = new Connection(stream);
  const timer = setTimeout(() => {
    connection.destroy(new AgentError(`the guest's agent said nothing for ${timeout} ms`, 'ERR_AGENT_TIMEOUT'));
  }, timeout);
  try {
    const hello = readHello(await connection.receive());
    // There is nothing more to be said.
    const end = () => connection.destroy();
    return { ...hello, closed: connection.receive().then(end, end) };
  } catch (error) {
    connection.destroy(error);
    throw error;
  } finally {
    clearTimeout(timer);
  }
}
