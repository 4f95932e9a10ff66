import { createSocket } from 'node:dgram';
import { isIP, Socket } from 'node:net';
import { put16, u16 } from './bytes.js';
import { isAnswerTo } from './dns-message.js';
import { closeSocket } from './udp-socket.js';

export interface Resolver {
  readonly address: string;
  readonly port: number;
  readonly family: 4 | 6;
}

/** A resolver from `1.1.1.1`, `1.1.1.1:53`, `::1` or `[::1]:53`; undefined when it is none of these. */
export function parseResolver(text: string): Resolver | undefined {
  const match = /^\[(.+)\](?::(\d{1,5}))?$/.exec(text) ?? /^([^:]+)(?::(\d{1,5}))?$/.exec(text) ?? [text, text];
  const address = match[1] as string;
  const port = Number(match[2] ?? 53);
  const family = isIP(address);
  if (family === 0 || port < 1 || port > 65535) return undefined;
  return { address, port, family: family as 4 | 6 };
}

/** Questions under way to the host's resolvers. Nothing here rejects: no answer is undefined. */
export class Upstream {
  readonly #timeout: number;
  readonly #queries = new Set<{ cancel: () => void; closed: Promise<void> }>();

  /** @param timeout of one question to one resolver, in milliseconds. */
  constructor(timeout: number) {
    this.#timeout = timeout;
  }

  async askUdp(resolver: Resolver, query: Uint8Array): Promise<Uint8Array | undefined> {
    const socket = createSocket(resolver.family === 4 ? 'udp4' : 'udp6');
    return this.#ask(
      (answer) => {
        socket.on('error', () => answer(undefined));
        socket.on('message', (message) => {
          if (isAnswerTo(message, query)) answer(message);
        });
        // Connected, so that nobody else can answer, and a resolver that is not there is noticed.
        socket.on('connect', () => socket.send(query, (error) => error && answer(undefined)));
        socket.connect(resolver.port, resolver.address);
      },
      () => closeSocket(socket),
    );
  }

  async askTcp(resolver: Resolver, query: Uint8Array): Promise<Uint8Array | undefined> {
    const socket = new Socket();
    let received = Buffer.alloc(0);
    return this.#ask(
      (answer) => {
        socket.on('error', () => answer(undefined));
        socket.on('end', () => answer(undefined));
        socket.on('data', (chunk) => {
          received = Buffer.concat([received, chunk]);
          if (received.length < 2 || received.length < 2 + u16(received, 0)) return;
          const message = received.subarray(2, 2 + u16(received, 0));
          answer(isAnswerTo(message, query) ? message : undefined);
        });
        const request = Buffer.alloc(2 + query.length);
        put16(request, 0, query.length);
        request.set(query, 2);
        socket.connect({ host: resolver.address, port: resolver.port, noDelay: true });
        socket.write(request);
      },
      () =>
        new Promise((resolve) => {
          socket.once('close', () => resolve());
          socket.destroy();
        }),
    );
  }

  #ask(
    start: (answer: (message: Uint8Array | undefined) => void) => void,
    close: () => Promise<void>,
  ): Promise<Uint8Array | undefined> {
    return new Promise((resolve) => {
      let done = false;
      let closed = () => {};
      const answer = (message: Uint8Array | undefined) => {
        if (done) return;
        done = true;
        clearTimeout(timer);
        resolve(message);
        void close().then(() => {
          this.#queries.delete(query);
          closed();
        });
      };
      const query = {
        cancel: () => answer(undefined),
        closed: new Promise<void>((settle) => {
          closed = settle;
        }),
      };
      this.#queries.add(query);
      const timer = setTimeout(query.cancel, this.#timeout);
      start(answer);
    });
  }

  async close(): Promise<void> {
    const queries = [...this.#queries];
    for (const query of queries) query.cancel();
    await Promise.all(queries.map((query) => query.closed));
  }
}
