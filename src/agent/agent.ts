import { randomBytes } from 'node:crypto';
import { AgentError, TsvisorError, UsageError } from '../errors.js';
import { type Channel, type Connect, DEFAULT_ANSWER_TIMEOUT, request } from './connection.js';
import { collect, type ExecOptions, type ExecResult, execRequest, type SpawnOptions } from './exec.js';
import { GuestFileSystem } from './file-system.js';
import { EPROTO, errnoOf, frameError } from './guest-error.js';
import { GuestProcess } from './process.js';
import { encodeFrame, type Frame, FrameType, FrameWriter, RenewFlag, SEED_SIZE } from './protocol.js';
import { checkSource } from './source.js';

export interface AgentOptions {
  /** Milliseconds that the agent has to take a request; default 30000. */
  readonly answerTimeout?: number;
  /** Is waited for before each operation; default nothing. */
  readonly ready?: (signal: AbortSignal | undefined) => Promise<void>;
}

export interface OperationOptions {
  readonly signal?: AbortSignal;
}

/** What a guest is called, apart from others that were restored from the same snapshot. What is not given stays. */
export interface GuestIdentity {
  readonly hostname?: string | undefined;
  /** By number of the interface: 0 is eth0. As `52:54:00:12:34:56`. */
  readonly macs?: ReadonlyMap<number, string> | undefined;
}

/**
 * The agent in a guest: runs programs there and moves files. Operations are independent of each other; each has a
 * connection of its own. The guest is not trusted: what breaks the protocol ends the operation with ERR_AGENT.
 *
 * Every operation rejects with AgentError (ERR_AGENT, ERR_AGENT_TIMEOUT), with the error of a machine that ended, or with
 * the reason of an aborted `signal`.
 */
export class Agent {
  readonly fs: GuestFileSystem;
  readonly #channel: Channel;

  /** @param connect opens a connection to AGENT_PORT of the guest; a Duplex for each operation */
  constructor(connect: Connect, { answerTimeout = DEFAULT_ANSWER_TIMEOUT, ready }: AgentOptions = {}) {
    this.#channel = { connect, timeout: answerTimeout, ready };
    this.fs = new GuestFileSystem(this.#channel);
  }

  /**
   * Runs a command to its end and collects its output. That of background processes it leaves behind is not waited for.
   * @throws GuestError ERR_EXEC, TsvisorError ERR_TIMEOUT, UsageError
   */
  exec(command: string, options: ExecOptions & { readonly encoding: 'buffer' }): Promise<ExecResult<Buffer>>;
  exec(command: string, options?: ExecOptions & { readonly encoding?: 'utf8' }): Promise<ExecResult>;
  exec(command: string, options?: ExecOptions): Promise<ExecResult<string | Buffer>>;
  async exec(command: string, options: ExecOptions = {}): Promise<ExecResult<string | Buffer>> {
    const { maxBuffer, encoding = 'utf8', stdin } = options;
    if (stdin !== undefined) checkSource(stdin, 'stdin');
    if (maxBuffer !== undefined && !(maxBuffer >= 0)) throw new UsageError(`maxBuffer: ${maxBuffer} is no size`);
    if (encoding !== 'utf8' && encoding !== 'buffer')
      throw new UsageError(`encoding: ${encoding} is not utf8 or buffer`);
    const { process, deadline } = await this.#start(command, options);
    try {
      return await collect(process, options);
    } catch (error) {
      options.signal?.throwIfAborted(); // a reason may be anything
      throw error;
    } finally {
      deadline?.clear();
    }
  }

  /** Starts a command, whose streams the caller reads. @throws GuestError ERR_EXEC if it cannot be started, UsageError */
  async spawn(command: string, options: SpawnOptions = {}): Promise<GuestProcess> {
    const { process, deadline } = await this.#start(command, options);
    const done = () => deadline?.clear();
    process.exited.then(done, done);
    return process;
  }

  async #start(command: string, options: SpawnOptions): Promise<{ process: GuestProcess; deadline?: Deadline }> {
    const { signal, timeout, tty } = options;
    const frame = execRequest(command, options);
    const deadline = timeout === undefined ? undefined : new Deadline(command, timeout);
    const either = signal && deadline ? AbortSignal.any([signal, deadline.signal]) : (signal ?? deadline?.signal);
    try {
      // Who gives a command an hour gives the agent as long to take it: its guest may have a busy host.
      const channel = { ...this.#channel, timeout: Math.max(this.#channel.timeout, timeout ?? 0) };
      const connection = await request(channel, frame, either);
      const process = await GuestProcess.start(connection, Boolean(tty), either);
      return { process, ...(deadline && { deadline }) };
    } catch (error) {
      deadline?.clear();
      throw error;
    }
  }

  /** Resolves when the agent has answered. */
  async ping({ signal }: OperationOptions = {}): Promise<void> {
    await this.#ask(encodeFrame(FrameType.ping), signal);
  }

  /** Has the guest's init power the machine off, or restart it. Resolves when it has been asked to, not when it is done. */
  async shutdown(action: 'poweroff' | 'reboot' = 'poweroff', { signal }: OperationOptions = {}): Promise<void> {
    if (action !== 'poweroff' && action !== 'reboot')
      throw new UsageError(`action: ${action} is not poweroff or reboot`);
    await this.#ask(new FrameWriter(FrameType.shutdown).u32(action === 'reboot' ? 1 : 0).frame(), signal);
  }

  /** Sets the guest's clock to the host's. */
  async syncTime({ signal }: OperationOptions = {}): Promise<void> {
    await this.#ask(() => putTime(new FrameWriter(FrameType.setTime)).frame(), signal);
  }

  /**
   * Has a guest that was restored from a snapshot seed its random numbers anew, take the host's time, and the identity.
   * @throws AgentError when it cannot, or is too old to know how.
   */
  async renew({ hostname = '', macs = new Map() }: GuestIdentity, { signal }: OperationOptions = {}): Promise<void> {
    const flags = RenewFlag.random | RenewFlag.time;
    const request = () => {
      const frame = new FrameWriter(FrameType.renew).u32(flags).bytes(randomBytes(SEED_SIZE));
      putTime(frame).string(hostname, 'hostname').u32(macs.size);
      for (const [index, mac] of macs) frame.u32(index).bytes(Buffer.from(mac.replaceAll(':', ''), 'hex'));
      return frame.frame();
    };
    await this.#ask(request, signal, (answer) => {
      const why =
        errnoOf(answer) === EPROTO
          ? 'it came with an older tsvisor; boot the guest anew'
          : frameError('ERR_GUEST_FILE', answer).message;
      return new AgentError(`the guest's agent cannot give the restored guest an identity of its own: ${why}`);
    });
  }

  async #ask(frame: Buffer | (() => Buffer), signal: AbortSignal | undefined, refused = refusal): Promise<void> {
    using connection = await request(this.#channel, frame, signal);
    const answer = await connection.expect();
    if (answer.type !== FrameType.ok) throw refused(answer);
  }
}

function refusal(answer: Frame): AgentError {
  const error = frameError('ERR_GUEST_FILE', answer);
  return error instanceof AgentError ? error : new AgentError(error.message);
}

/** The host's time, in seconds and nanoseconds. */
function putTime(frame: FrameWriter): FrameWriter {
  const now = Date.now();
  return frame.u64(BigInt(Math.floor(now / 1000))).u32((now % 1000) * 1e6);
}

class Deadline {
  readonly #controller = new AbortController();
  readonly #timer: NodeJS.Timeout;

  constructor(command: string, timeout: number) {
    this.#timer = setTimeout(() => {
      this.#controller.abort(new TsvisorError('ERR_TIMEOUT', `'${command}' was not done in ${timeout} ms`));
    }, timeout);
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  clear(): void {
    clearTimeout(this.#timer);
  }
}
