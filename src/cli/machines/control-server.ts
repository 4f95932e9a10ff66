import { renameSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { errorToData, TsvisorError, UsageError } from '../../errors.js';
import type { MigrationProgress } from '../../migration/options.js';
import {
  ANSWER_MS,
  CONTROL_VERSION,
  type ControlAnswer,
  type ControlMethod,
  type ControlMethods,
  IDLE_MS,
  MAX_CLIENTS,
  MAX_LINE,
} from './control-protocol.js';
import { LineReader } from './line-reader.js';

/** Who asks. */
export interface ControlCall {
  /** Aborts when it does not wait any more. */
  readonly signal: AbortSignal;
  /** Tells it how far what it asked for is. */
  readonly onProgress: (progress: MigrationProgress) => void;
}

/** What a machine does when it is asked; whatever it throws is the client's answer. */
export type ControlHandlers = {
  readonly [M in Exclude<ControlMethod, 'console'>]: (
    params: ControlMethods[M]['params'],
    call: ControlCall,
  ) => Promise<ControlMethods[M]['result']>;
} & {
  /** Takes the connection over once its client has been told so. @throws TsvisorError when there is no console. */
  readonly console: () => (client: Socket, typed: Buffer) => void;
};

/** How long a client that is sent away has to hear why, in milliseconds. */
const GOODBYE_MS = 500;

/** A machine's end of the control protocol. No client, whatever it does, concerns another one or the machine. */
export class ControlServer implements AsyncDisposable {
  readonly #server: Server;
  readonly #clients = new Set<Socket>();

  private constructor(handlers: ControlHandlers) {
    this.#server = createServer({ allowHalfOpen: true }, (client) => {
      this.#clients.add(client);
      client.on('error', () => {}); // it left in a hurry
      client.on('close', () => this.#clients.delete(client));
      void serve(client, handlers).catch(() => client.destroy());
    });
    this.#server.maxConnections = MAX_CLIENTS;
  }

  /**
   * @param path of a socket to be, in a folder of this user alone; whoever owns the folder removes it
   * @throws TsvisorError ERR_OUTPUT
   */
  static async listen(path: string, handlers: ControlHandlers): Promise<ControlServer> {
    const control = new ControlServer(handlers);
    // Node removes the path it listens on when it closes, whosever that is by then.
    const temporary = `${path}.${process.pid}`;
    try {
      await new Promise<void>((resolve, reject) => {
        control.#server.on('error', reject);
        const mask = process.umask(0o177);
        control.#server.listen(temporary, resolve); // makes the path at once
        process.umask(mask);
      });
      renameSync(temporary, path);
    } catch (error) {
      control.#server.close();
      const { code, message } = error as NodeJS.ErrnoException;
      throw new TsvisorError('ERR_OUTPUT', `cannot make the control socket ${path}: ${code ?? message}`, {
        cause: error,
      });
    }
    return control;
  }

  /** Lets clients read what they were told, for a moment; then nothing of them is left. */
  async [Symbol.asyncDispose](): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    for (const client of this.#clients) client.end();
    const impatience = setTimeout(() => {
      for (const client of this.#clients) client.destroy();
    }, GOODBYE_MS);
    await closed;
    clearTimeout(impatience);
  }
}

type Handler = (params: unknown, call: ControlCall) => Promise<unknown>;

async function serve(client: Socket, handlers: ControlHandlers): Promise<void> {
  const lines = new LineReader(client, MAX_LINE);
  const tell = (answer: ControlAnswer) => client.write(`${JSON.stringify(answer)}\n`);
  const gone = new AbortController();
  const call: ControlCall = {
    signal: gone.signal,
    onProgress: (progress) => client.writableLength === 0 && tell({ progress }),
  };
  const onGone = () => gone.abort();
  client.on('close', onGone).on('end', () => {
    onGone();
    setTimeout(() => client.destroy(), ANSWER_MS).unref();
  });
  for (;;) {
    const idle = setTimeout(() => client.destroy(), IDLE_MS);
    let line: string | undefined;
    try {
      line = await lines.next();
    } catch (error) {
      client.end(`${JSON.stringify({ error: errorToData(new UsageError((error as Error).message)) })}\n`);
      // It hears that when it has said the rest, which is thrown away, or not at all.
      lines.rest();
      client.resume();
      setTimeout(() => client.destroy(), GOODBYE_MS).unref();
      return;
    } finally {
      clearTimeout(idle);
    }
    if (line === undefined) {
      client.end();
      return;
    }
    try {
      const { method, params } = parseRequest(line);
      if (method === 'console') {
        const takeOver = handlers.console();
        tell({ result: {} });
        takeOver(client, lines.rest());
        return;
      }
      tell({ result: await (handlers[method] as Handler)(params, call) });
    } catch (error) {
      const { name, code, message } = errorToData(error);
      tell({ error: { name, code, message } });
    }
  }
}

const isNumber = (value: unknown, min: number, max: number) =>
  typeof value === 'number' && value >= min && value <= max;
const isBoolean = (value: unknown) => typeof value === 'boolean';
const isSize = (value: unknown) => isNumber(value, 1, 65535) && Number.isInteger(value);

/** Each method, and whether its parameters are what they should be. */
const CHECKS: Readonly<Record<ControlMethod, (params: Readonly<Record<string, unknown>>) => boolean>> = {
  status: () => true,
  wait: () => true,
  ready: ({ timeout }) => isNumber(timeout, 0, 2 ** 31 - 1),
  stop: ({ timeout, force }) => isNumber(timeout, 0, 2 ** 31 - 1) && isBoolean(force),
  snapshot: ({ folder, disks, differential, track, stop }) =>
    typeof folder === 'string' &&
    folder.startsWith('/') &&
    !folder.includes('\0') &&
    (disks === 'copy' || disks === 'reference') &&
    [differential, track, stop].every(isBoolean),
  migrate: ({ address, key, maxDowntime }) =>
    typeof address === 'string' && typeof key === 'string' && isNumber(maxDowntime, 1, 2 ** 31 - 1),
  console: () => true,
  resize: ({ rows, columns }) => isSize(rows) && isSize(columns),
};

function parseRequest(line: string): { method: ControlMethod; params: object } {
  let request: unknown;
  try {
    request = JSON.parse(line);
  } catch {
    throw new UsageError('a request is one line of JSON');
  }
  const { version, method, params = {} } = ((typeof request === 'object' && request) || {}) as Record<string, unknown>;
  if (version !== CONTROL_VERSION) {
    throw new UsageError(`this machine speaks version ${CONTROL_VERSION} of the control protocol, not ${version}`);
  }
  if (typeof method !== 'string' || !Object.hasOwn(CHECKS, method)) throw new UsageError(`no method '${method}'`);
  if (typeof params !== 'object' || params === null || !CHECKS[method as ControlMethod](params as never)) {
    throw new UsageError(`${method}: wrong parameters`);
  }
  return { method: method as ControlMethod, params };
}
