import { constants } from 'node:os';
import { Readable, Writable } from 'node:stream';
import type { ConsoleSize } from '../backends/port-stream.js';
import { AgentError, UsageError } from '../errors.js';
import type { Connection } from './connection.js';
import { frameError } from './guest-error.js';
import {
  encodeFrame,
  type Frame,
  FrameType,
  FrameWriter,
  MAX_DATA,
  OUTPUT_WINDOW,
  PayloadReader,
  STDIN_WINDOW,
  violation,
} from './protocol.js';

/** How a process ended: one of the two is null. */
export interface ProcessExit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** Milliseconds for a process to go after the agent was asked to end it, which takes it 2 s at most. */
const TERMINATE_TIMEOUT = 10_000;

/** A process in the guest. Its streams' errors are also those of `exited`; nobody need listen for them. */
export class GuestProcess implements AsyncDisposable {
  readonly pid: number;
  /** Fails with EPIPE once the process has closed it. On a terminal, end() sends ^D. */
  readonly stdin: Writable;
  /** With a terminal, all output. Destroying it discards what follows. */
  readonly stdout: Readable;
  readonly stderr: Readable;
  /** Rejects when the connection is lost, or with the reason of an abort once the process is gone. */
  readonly exited: Promise<ProcessExit>;
  readonly #connection: Connection;
  readonly #input: Input;
  readonly #outputs: Output[];
  #exit: ProcessExit | undefined;
  #settle!: { resolve(exit: ProcessExit): void; reject(reason: unknown): void };
  #abortReason: { readonly reason: unknown } | undefined;
  readonly #closed: Promise<void>;

  /**
   * For Agent.spawn().
   * @param connection to an agent that was asked to EXEC; from now on this process's. @param signal ends the process
   */
  static async start(connection: Connection, terminal: boolean, signal?: AbortSignal): Promise<GuestProcess> {
    try {
      const frame = await connection.expect();
      if (frame.type !== FrameType.started) throw frameError('ERR_EXEC', frame);
      const payload = new PayloadReader(frame.payload);
      const pid = payload.u32();
      payload.end();
      const process = new GuestProcess(connection, pid, terminal);
      process.#heed(signal);
      return process;
    } catch (error) {
      connection.destroy(error);
      throw error;
    }
  }

  private constructor(connection: Connection, pid: number, terminal: boolean) {
    this.pid = pid;
    this.#connection = connection;
    this.#input = new Input(connection);
    this.#outputs = [new Output(connection, 1), new Output(connection, 2)];
    this.stdin = this.#input.stream;
    [this.stdout, this.stderr] = this.#outputs.map(({ stream }) => stream) as [Readable, Readable];
    if (terminal) this.#outputs[1]?.end();
    this.exited = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    this.exited.catch(() => {}); // not everybody asks
    this.#closed = this.#run();
  }

  /** Sends a signal to the process and its group. Nothing happens once it has exited. */
  async kill(signal: NodeJS.Signals | number = 'SIGTERM'): Promise<void> {
    const number = typeof signal === 'number' ? signal : constants.signals[signal];
    if (!Number.isInteger(number) || number < 1 || number > 64) throw new UsageError(`signal: ${signal} is none`);
    if (!this.#exit) await this.#connection.send(new FrameWriter(FrameType.signal).u32(number).frame());
  }

  /** Tells the size of the terminal; without one nothing happens. */
  async resize({ rows, columns }: ConsoleSize): Promise<void> {
    checkSize(rows, columns);
    if (!this.#exit) await this.#connection.send(new FrameWriter(FrameType.resize).u32(rows).u32(columns).frame());
  }

  /**
   * Ends the process and its group, SIGTERM first, then SIGKILL. `exited` then rejects with the reason. Nothing happens
   * once it has exited.
   */
  async terminate(reason: unknown): Promise<void> {
    if (this.#abortReason) return this.#closed;
    if (this.#exit) return;
    this.#abortReason = { reason };
    const timer = setTimeout(() => this.#connection.destroy(reason), TERMINATE_TIMEOUT);
    try {
      // What is still to come is not wanted, and must not hold up the exit.
      for (const { stream } of this.#outputs) stream.destroy();
      await this.#connection.send(encodeFrame(FrameType.terminate));
    } catch {
      // the connection is lost: then the agent ends it
    }
    await this.#closed;
    clearTimeout(timer);
  }

  /** Ends the process if it still runs, and lets go of its streams. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#exit) await this.terminate(new AgentError('the process was disposed of'));
    this.#connection.destroy();
    await this.#closed;
  }

  /** Handles what comes until all is over; never rejects. */
  async #run(): Promise<void> {
    try {
      while (!this.#exit || this.#outputs.some(({ ended }) => !ended)) this.#handle(await this.#connection.expect());
    } catch (error) {
      this.#fail(error);
    } finally {
      this.#connection.destroy();
    }
  }

  #heed(signal: AbortSignal | undefined): void {
    const abort = () => {
      // The rest of its output is not waited for.
      if (this.#exit) this.#connection.destroy(signal?.reason);
      else void this.terminate(signal?.reason);
    };
    this.#connection.release();
    signal?.addEventListener('abort', abort, { once: true });
    if (signal?.aborted) abort();
    void this.#closed.then(() => signal?.removeEventListener('abort', abort));
  }

  #fail(error: unknown): void {
    const reason = this.#abortReason ? this.#abortReason.reason : error;
    this.#settle.reject(reason);
    const streamError = reason instanceof Error ? reason : new AgentError(String(reason));
    for (const stream of [this.stdin, this.stdout, this.stderr]) stream.destroy(streamError);
  }

  #handle({ type, payload }: Frame): void {
    const reader = new PayloadReader(payload);
    if (type === FrameType.stdout) this.#outputs[0]?.push(payload);
    else if (type === FrameType.stderr) this.#outputs[1]?.push(payload);
    else if (this.#exit) throw violation('a frame after the exit');
    else if (type === FrameType.exit) {
      this.#exit = readExit(reader);
      if (this.#abortReason) this.#fail(this.#abortReason.reason);
      else this.#settle.resolve(this.#exit);
      this.#input.close();
    } else if (type === FrameType.stdinClosed) this.#input.close();
    else if (type === FrameType.credit) {
      if (reader.u32() !== 0) throw violation('credit for a stream that is not stdin');
      this.#input.grant(reader.u32());
      reader.end();
    } else throw frameError('ERR_EXEC', { type, payload });
  }
}

export function checkSize(rows: number, columns: number): void {
  for (const [name, value] of Object.entries({ rows, columns })) {
    if (!Number.isInteger(value) || value < 0 || value > 65535)
      throw new UsageError(`${name}: ${value} is no number of ${name}`);
  }
}

const signalNames = new Map(Object.entries(constants.signals).map(([name, number]) => [number, name]));

function readExit(reader: PayloadReader): ProcessExit {
  const code = reader.u32();
  const signal = reader.u32();
  reader.end();
  if (code > 255 || signal > 64 || (code !== 0 && signal !== 0)) throw violation('an impossible exit status');
  if (signal === 0) return { code, signal: null };
  // Real-time signals have no names in Node.
  return { code: null, signal: (signalNames.get(signal) ?? `SIG${signal}`) as NodeJS.Signals };
}

/** stdin: sends no more than the agent has room for. */
class Input {
  readonly stream: Writable;
  readonly #connection: Connection;
  #credit = STDIN_WINDOW;
  #resume: (() => void) | undefined;

  constructor(connection: Connection) {
    this.#connection = connection;
    this.stream = new Writable({
      write: (chunk: Buffer, _encoding, done) => void this.#send(chunk).then(() => done(), done),
      final: (done) => void connection.send(encodeFrame(FrameType.stdin)).then(() => done(), done),
      destroy: (error, done) => {
        this.#resume?.();
        done(error);
      },
    });
    this.stream.on('error', () => {});
  }

  grant(bytes: number): void {
    this.#credit += bytes;
    if (this.#credit > STDIN_WINDOW) throw violation('more credit than was used');
    this.#resume?.();
  }

  /** Nobody reads it any more. */
  close(): void {
    if (this.stream.writableFinished) this.stream.destroy();
    else this.stream.destroy(Object.assign(new Error('write EPIPE'), { code: 'EPIPE' }));
  }

  async #send(chunk: Buffer): Promise<void> {
    for (let at = 0; at < chunk.length; ) {
      while (this.#credit === 0 && !this.stream.destroyed) {
        await new Promise<void>((resolve) => {
          this.#resume = resolve;
        });
      }
      if (this.stream.destroyed) return;
      const part = chunk.subarray(at, at + Math.min(this.#credit, MAX_DATA));
      this.#credit -= part.length;
      at += part.length;
      await this.#connection.send(encodeFrame(FrameType.stdin, part));
    }
  }
}

/** stdout or stderr: has the agent send no more than was read, and a window. */
class Output {
  readonly stream: Readable;
  /** Whether the guest has ended it. */
  ended = false;
  readonly #connection: Connection;
  readonly #number: number;
  #credit = OUTPUT_WINDOW;

  constructor(connection: Connection, number: number) {
    this.#connection = connection;
    this.#number = number;
    this.stream = new Readable({
      read: () => this.#grant(),
      destroy: (error, done) => {
        this.#grant();
        done(error);
      },
    });
    this.stream.on('error', () => {});
  }

  push(data: Buffer): void {
    if (this.ended) throw violation('output after its end');
    this.#credit -= data.length;
    if (this.#credit < 0) throw violation('more output than was asked for');
    if (data.length === 0) this.end();
    else if (this.stream.destroyed) this.#grant();
    else this.stream.push(data);
  }

  end(): void {
    this.ended = true;
    if (!this.stream.destroyed) this.stream.push(null);
  }

  /** Called when the reader wants more: what it has not taken yet is less than the stream's high-water mark. */
  #grant(): void {
    const bytes = OUTPUT_WINDOW - this.#credit;
    if (this.ended || bytes < OUTPUT_WINDOW / 4) return;
    this.#credit = OUTPUT_WINDOW;
    const frame = new FrameWriter(FrameType.credit).u32(this.#number).u32(bytes).frame();
    this.#connection.post(frame);
  }
}
