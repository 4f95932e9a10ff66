import { connect, type Socket } from 'node:net';
import { type ErrorData, errorFromData, TsvisorError } from '../../errors.js';
import type { MigrationProgress } from '../../migration/options.js';
import { ANSWER_MS, CONTROL_VERSION, type ControlMethod, type ControlMethods } from './control-protocol.js';
import { LineReader } from './line-reader.js';
import { isRunning, pathsOf } from './machine-folder.js';

/** Bytes of an answer's line: a machine of this user is trusted with more than a client is. */
const MAX_ANSWER = 2 ** 20;
/** How to wait for an answer. */
export interface RequestOptions {
  /** In milliseconds; Infinity for what takes as long as it takes. Default: for what is answered at once. */
  readonly timeout?: number;
  readonly signal?: AbortSignal;
  /** Whether the machine can give up what it was asked for: then it is waited until it has. Default false. */
  readonly withdraw?: boolean;
  /** Told how far it is, by a method that tells. */
  readonly onProgress?: (progress: MigrationProgress) => void;
}

/** A connection to the process of a machine. */
export class ControlClient implements Disposable {
  readonly name: string;
  readonly #socket: Socket;
  readonly #lines: LineReader;

  private constructor(name: string, socket: Socket) {
    this.name = name;
    this.#socket = socket;
    this.#lines = new LineReader(socket, MAX_ANSWER);
    socket.on('error', () => {}); // seen as its end
  }

  /** @throws TsvisorError ERR_MACHINE_NOT_FOUND when no machine of that name runs. */
  static async connect(name: string): Promise<ControlClient> {
    const { control } = pathsOf(name);
    const socket = connect(control);
    try {
      await new Promise<void>((resolve, reject) => socket.once('connect', resolve).once('error', reject));
    } catch (error) {
      if (isRunning(name)) {
        const why = `machine ${name} is starting or ending; try again`;
        throw new TsvisorError('ERR_MACHINE_NOT_FOUND', why, { cause: error });
      }
      throw notFound(name);
    }
    return new ControlClient(name, socket);
  }

  /**
   * Asks, and waits for the answer.
   * @throws what the machine answered; ERR_MACHINE_ENDED when it ends meanwhile; ERR_TIMEOUT; the signal's reason.
   */
  async request<M extends ControlMethod>(
    method: M,
    params: ControlMethods[M]['params'],
    { timeout = ANSWER_MS, signal, withdraw = false, onProgress }: RequestOptions = {},
  ): Promise<ControlMethods[M]['result']> {
    signal?.throwIfAborted();
    this.#socket.write(`${JSON.stringify({ version: CONTROL_VERSION, method, params })}\n`);
    let late = false;
    const timer =
      Number.isFinite(timeout) &&
      setTimeout(() => {
        late = true;
        this.#socket.destroy();
      }, timeout);
    const onAbort = () => {
      if (!withdraw) this.#socket.destroy();
      else this.#socket.end().setTimeout(ANSWER_MS, () => this.#socket.destroy());
    };
    signal?.addEventListener('abort', onAbort);
    try {
      const line = await this.#answer(onProgress);
      const done = withdraw && line?.startsWith('{"result"'); // before the machine heard of it
      if (!done) signal?.throwIfAborted();
      if (late)
        throw new TsvisorError('ERR_TIMEOUT', `machine ${this.name} does not answer; tsvisor stop --force ends it`);
      if (line === undefined) throw new TsvisorError('ERR_MACHINE_ENDED', `machine ${this.name} has ended`);
      const answer: { result: ControlMethods[M]['result'] } | { error: ErrorData } = JSON.parse(line);
      if ('error' in answer) throw errorFromData(answer.error);
      return answer.result;
    } finally {
      if (timer) clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
    }
  }

  /** The line that is no progress. */
  async #answer(onProgress: RequestOptions['onProgress']): Promise<string | undefined> {
    for (;;) {
      const line = await this.#lines.next();
      if (!line?.startsWith('{"progress"')) return line;
      onProgress?.(JSON.parse(line).progress);
    }
  }

  /** Joins the console. @returns its bytes, both ways. */
  async console(): Promise<Socket> {
    await this.request('console', {});
    const rest = this.#lines.rest();
    if (rest.length > 0) this.#socket.unshift(rest);
    return this.#socket;
  }

  [Symbol.dispose](): void {
    this.#socket.destroy();
  }
}

/** One request on a connection of its own. */
export async function ask<M extends ControlMethod>(
  name: string,
  method: M,
  params: ControlMethods[M]['params'],
  options?: RequestOptions,
): Promise<ControlMethods[M]['result']> {
  using client = await ControlClient.connect(name);
  return await client.request(method, params, options);
}

export function notFound(name: string): TsvisorError {
  return new TsvisorError('ERR_MACHINE_NOT_FOUND', `no machine '${name}' runs; tsvisor ps lists those that do`);
}
