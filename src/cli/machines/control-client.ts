import { connect, type Socket } from 'node:net';
import { type ErrorData, errorFromData, TsvisorError } from '../../errors.js';
import { CONTROL_VERSION, type ControlMethod, type ControlMethods } from './control-protocol.js';
import { LineReader } from './line-reader.js';
import { isRunning, pathsOf } from './machine-folder.js';

/** Bytes of an answer's line: a machine of this user is trusted with more than a client is. */
const MAX_ANSWER = 2 ** 20;
/** How long a machine may take to answer what it answers at once, in milliseconds. */
export const ANSWER_MS = 5000;

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
   * @param timeout in milliseconds; Infinity for what takes as long as it takes.
   * @throws what the machine answered; ERR_MACHINE_ENDED when it ends meanwhile; ERR_TIMEOUT; the signal's reason.
   */
  async request<M extends ControlMethod>(
    method: M,
    params: ControlMethods[M]['params'],
    { timeout = ANSWER_MS, signal }: { timeout?: number; signal?: AbortSignal } = {},
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
    const onAbort = () => this.#socket.destroy();
    signal?.addEventListener('abort', onAbort);
    try {
      const line = await this.#lines.next();
      signal?.throwIfAborted();
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
  options?: { timeout?: number; signal?: AbortSignal },
): Promise<ControlMethods[M]['result']> {
  using client = await ControlClient.connect(name);
  return await client.request(method, params, options);
}

export function notFound(name: string): TsvisorError {
  return new TsvisorError('ERR_MACHINE_NOT_FOUND', `no machine '${name}' runs; tsvisor ps lists those that do`);
}
