import type { Duplex } from 'node:stream';
import { finished } from 'node:stream/promises';
import { TsvisorError } from '../errors.js';
import { deferred } from '../machine/deferred.js';
import type { MachineEnd } from '../machine/end.js';
import type { Machine } from '../machine/machine.js';
import { CLOSED_STDOUT_EXIT, END_EXIT, ERROR_EXIT, ESCAPE_EXIT, TIMEOUT_EXIT } from './exit-codes.js';
import type { Ended } from './machines/control-protocol.js';
import { onSignals } from './signals.js';
import {
  CONSOLE_PORT,
  type Connection,
  connectFile,
  connectSocket,
  type StreamRequest,
  type StreamRequests,
} from './streams.js';
import { EscapeFilter, rawTerminal } from './terminal.js';

/** How long a machine thread may take to obey a stop before the process gives up on it, in milliseconds. */
const STOP_GRACE = 5000;

const CTRL_D = '\x04';

/** How long a guest has to power off when a signal asks the machine to end, in milliseconds. */
const POWER_OFF_GRACE = 10_000;

export interface SessionOptions {
  /** Ends the machine after so many milliseconds. */
  readonly timeout?: number | undefined;
  /** Leaves stdin, stdout and signals that ask to end to somebody else; the console is for who joins it. */
  readonly headless?: boolean;
  /** Whether a first signal lets the guest's agent power it off. */
  readonly powersOff?: boolean;
}

/** One machine of this process, until it ends or a signal, a client, the escape key, a closed stdout or the clock ends it. */
export class Session {
  readonly #machine: Machine;
  readonly #streams: StreamRequests;
  readonly #options: SessionOptions;
  readonly #connections: Connection[] = [];
  readonly #stopped = deferred<void>();
  readonly #ended = deferred<Ended>();
  #startedAt: number | undefined;
  #stopping: 'no' | 'gently' | 'at once' = 'no';
  /** The exit code of what stopped the machine from outside. */
  #stopCode: number | undefined;
  #failure: Error | undefined;
  #endOfInput: NodeJS.Timeout | undefined;
  #restoreTerminal = () => {};
  #removeResize = () => {};
  #removeSignals = () => {};

  constructor(machine: Machine, streams: StreamRequests, options: SessionOptions) {
    this.#machine = machine;
    this.#streams = streams;
    this.#options = options;
  }

  /** The guest's console that stdin and stdout stand for, if one does. */
  get terminal(): Duplex | undefined {
    if (this.terminalIsConsolePort) return this.#machine.port(CONSOLE_PORT);
    return this.#streams.serial.target.kind === 'stdio' ? this.#machine.serial : undefined;
  }

  /** Whether it is hvc0, which has a size. */
  get terminalIsConsolePort(): boolean {
    return this.#streams.console.target.kind === 'stdio';
  }

  /** Milliseconds since the guest was started. */
  get uptime(): number {
    return this.#startedAt === undefined ? 0 : Math.round(performance.now() - this.#startedAt);
  }

  /** Resolves when the machine has ended. */
  get ended(): Promise<Ended> {
    return this.#ended.promise;
  }

  /** From now on signals are somebody else's. */
  leaveSignals(): void {
    this.#removeSignals();
  }

  /** Cuts the machine's power, if it still runs. @param code what the process exits with then */
  stop(code: number): void {
    this.#stop(code);
  }

  /**
   * Has the agent power the guest off, and cuts its power when it has not within so many milliseconds.
   * @param code what the process exits with in that case. @returns how the machine ended
   */
  powerOff(code: number, timeout: number): Promise<Ended> {
    if (this.#stopping === 'no') {
      this.#stopping = 'gently';
      this.#stopCode = code;
      const stopped = this.#machine.stop({ graceful: true, timeout });
      stopped.then(({ reason }) => reason === 'stopped' && this.#stopped.resolve(), this.#stopped.reject);
    } else if (this.#stopping === 'gently') {
      // Who asked before may have had more patience.
      const timer = setTimeout(() => this.#stop(code), timeout);
      const done = () => clearTimeout(timer);
      this.ended.then(done, done);
    }
    return this.ended;
  }

  /** Does what ends the machine, if it succeeds. @param code what the process exits with then */
  async endBy<T>(code: number, ending: () => Promise<T>): Promise<T> {
    const before = this.#stopCode;
    this.#stopCode ??= code;
    try {
      return await ending();
    } catch (error) {
      this.#stopCode = before;
      throw error;
    }
  }

  /** @param onStart called when the guest runs */
  async run(onStart = () => {}): Promise<{ code: number; end: MachineEnd }> {
    this.#removeSignals = onSignals((code) => this.#onSignal(code));
    const { timeout } = this.#options;
    const timer = timeout && setTimeout(() => this.#stop(TIMEOUT_EXIT), timeout);
    try {
      await this.#connectAll();
      const { state } = this.#machine;
      if (state === 'created') await this.#machine.start();
      else if (state === 'paused') await this.#machine.resume();
      this.#startedAt = performance.now();
      onStart();
      const end = await this.#machine.wait();
      // What the guest said last is still on its way, unless nobody waits for it any more.
      await Promise.race([Promise.all(this.#connections.map((c) => c.done())), this.#stopped.promise]);
      if (this.#failure) throw this.#failure;
      const code = this.#exitCode(end);
      this.#ended.resolve({ message: end.message, exitCode: code, reason: end.reason });
      return { code, end };
    } catch (error) {
      this.#ended.reject(error as Error);
      throw error;
    } finally {
      if (timer) clearTimeout(timer);
      clearInterval(this.#endOfInput);
      this.#removeSignals();
      this.#removeResize();
      this.#restoreTerminal();
      process.stdin.destroy();
      for (const connection of this.#connections) connection.close();
    }
  }

  #exitCode(end: MachineEnd): number {
    if (end.reason === 'stopped') return this.#stopCode ?? ERROR_EXIT.ERR_INTERNAL;
    return end.reason === 'guest-exit' ? (end.code ?? 0) : END_EXIT[end.reason];
  }

  #stop(code: number): void {
    if (this.#stopping === 'at once') return;
    this.#stopping = 'at once';
    this.#stopCode ??= code;
    const impatience = setTimeout(() => {
      this.#restoreTerminal();
      for (const connection of this.#connections) connection.close();
      process.kill(process.pid, 'SIGKILL'); // process.exit() would wait for the thread that does not answer
    }, STOP_GRACE).unref();
    void this.#machine
      .stop()
      .then(() => this.#stopped.resolve(), this.#stopped.reject)
      .finally(() => clearTimeout(impatience));
  }

  #onSignal(code: number): void {
    if (this.#options.powersOff && this.#stopping === 'no') void this.powerOff(code, POWER_OFF_GRACE).catch(() => {});
    else this.#stop(code);
  }

  async #connectAll(): Promise<void> {
    const { serial, console, ports } = this.#streams;
    await this.#connect(this.#machine.serial, serial);
    if (console.target.kind !== 'none') await this.#connect(this.#machine.port(CONSOLE_PORT), console);
    for (const port of ports) await this.#connect(this.#machine.port(port.name), port);
    if (console.target.kind === 'stdio' && !this.#options.headless) await this.#followSize();
  }

  async #connect(stream: Duplex, { option, target }: StreamRequest): Promise<void> {
    switch (target.kind) {
      case 'none':
        stream.resume();
        break;
      case 'file':
        this.#connections.push(
          connectFile(stream, target.path, (error) => {
            this.#failure ??= new TsvisorError('ERR_OUTPUT', `${option}: cannot write: ${error.message}`);
            this.#stop(ERROR_EXIT.ERR_OUTPUT);
          }),
        );
        break;
      case 'socket':
        this.#connections.push(await connectSocket(stream, option, target.path));
        break;
      case 'stdio':
        if (this.#options.headless) {
          this.#connections.push(untilEnd(stream.resume()));
          break;
        }
        this.#connections.push(this.#connectStdout(stream));
        this.#connectStdin(stream);
        break;
    }
  }

  #connectStdout(stream: Duplex): Connection {
    process.stdout.on('error', () => this.#stop(CLOSED_STDOUT_EXIT));
    stream.pipe(process.stdout, { end: false });
    return untilEnd(stream);
  }

  #connectStdin(stream: Duplex): void {
    const { stdin } = process;
    if (stdin.isTTY) {
      const filter = new EscapeFilter({ x: { does: 'end the machine', run: () => this.#stop(ESCAPE_EXIT) } }, (text) =>
        process.stderr.write(text),
      );
      this.#restoreTerminal = rawTerminal();
      stdin.pipe(filter).pipe(stream, { end: false });
      return;
    }
    let any = false;
    stdin.on('data', () => {
      any = true;
    });
    // The end of a script is Ctrl-D to the guest's terminal, typed again every second while the guest takes it, since one
    // that comes before anybody reads is lost. No input at all (</dev/null, a daemon) is not an end.
    stdin.on('end', () => {
      if (any) this.#endOfInput = setInterval(() => stream.writableLength === 0 && stream.write(CTRL_D), 1000);
    });
    stdin.on('error', () => {}); // a stdin that cannot be read is one that says nothing
    stdin.pipe(stream, { end: false });
  }

  /** The guest's terminal has the size of this one. */
  async #followSize(): Promise<void> {
    const { stdout } = process;
    if (!stdout.isTTY) return;
    const tell = async () => {
      const { rows, columns } = stdout;
      if (rows > 0 && columns > 0) await this.#machine.resizeConsole(CONSOLE_PORT, { rows, columns });
    };
    const onResize = () => void tell().catch(() => {}); // the machine may have ended
    stdout.on('resize', onResize);
    this.#removeResize = () => stdout.removeListener('resize', onResize);
    await tell();
  }
}

/** A stream that somebody else reads. */
function untilEnd(stream: Duplex): Connection {
  const read = finished(stream, { writable: false }).catch(() => {});
  return { done: () => read, close: () => {} };
}
