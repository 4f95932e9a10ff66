import type { VsockStream } from './stream.js';

/** Connections of the guest that may wait to be accepted; further ones are refused. */
const BACKLOG = 128;

/**
 * Connections that the guest makes to a port of the host. Iterate over it to accept them; the loop ends when the
 * listener is closed or the machine ends.
 *
 * ```ts
 * for await (const stream of machine.vsock.listen(5000)) stream.pipe(process.stdout);
 * ```
 */
export class VsockListener implements AsyncIterable<VsockStream>, AsyncDisposable {
  readonly port: number;
  readonly #onClose: () => void;
  readonly #backlog = new Set<VsockStream>();
  readonly #takers: ((result: IteratorResult<VsockStream, undefined>) => void)[] = [];
  #closed = false;

  /** @internal */
  constructor(port: number, onClose: () => void) {
    this.port = port;
    this.#onClose = onClose;
  }

  /** @internal Whether no connection may be added. */
  get full(): boolean {
    return this.#backlog.size >= BACKLOG;
  }

  /** @internal */
  add(stream: VsockStream): void {
    const taker = this.#takers.shift();
    if (taker) {
      taker({ done: false, value: stream });
      return;
    }
    this.#backlog.add(stream);
    stream.once('close', () => this.#backlog.delete(stream));
  }

  /** Accepts no more: further connections are refused, those that wait are reset. Accepted ones stay. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#onClose();
    for (const stream of this.#backlog) stream.destroy();
    for (const taker of this.#takers.splice(0)) taker({ done: true, value: undefined });
  }

  /** close(), for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** Leaving a loop does not close the listener. */
  [Symbol.asyncIterator](): AsyncIterator<VsockStream, undefined> {
    return {
      next: () =>
        new Promise((resolve) => {
          const [stream] = this.#backlog;
          if (stream) {
            this.#backlog.delete(stream);
            resolve({ done: false, value: stream });
          } else if (this.#closed) {
            resolve({ done: true, value: undefined });
          } else {
            this.#takers.push(resolve);
          }
        }),
      return: async () => ({ done: true, value: undefined }),
    };
  }
}
