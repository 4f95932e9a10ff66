import type { Duplex } from 'node:stream';

/** Lines of a stream, one by one. It reads ahead, so that the end of the stream is seen, but no more than a line's limit. */
export class LineReader {
  readonly #stream: Duplex;
  readonly #limit: number;
  #held: Buffer = Buffer.alloc(0);
  #ended = false;
  #wake = () => {};

  /** @param limit bytes of a line */
  constructor(stream: Duplex, limit: number) {
    this.#stream = stream;
    this.#limit = limit;
    stream.on('data', this.#onData).on('end', this.#onEnd).on('close', this.#onEnd);
  }

  /** @returns the next line; undefined at the end of the stream, however it ended. @throws Error when it is too long. */
  async next(): Promise<string | undefined> {
    for (;;) {
      const end = this.#held.indexOf('\n');
      if (end >= this.#limit || (end < 0 && this.#held.length >= this.#limit)) {
        throw new Error(`a line of more than ${this.#limit} bytes`);
      }
      if (end >= 0) {
        const line = this.#held.toString('utf8', 0, end);
        this.#held = this.#held.subarray(end + 1);
        return line;
      }
      if (this.#ended) return undefined;
      this.#stream.resume();
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }

  /** For who goes on without lines: stops reading. @returns what was read after the last line. */
  rest(): Buffer {
    this.#stream.pause();
    this.#stream.off('data', this.#onData).off('end', this.#onEnd).off('close', this.#onEnd);
    return this.#held;
  }

  readonly #onData = (chunk: Buffer) => {
    this.#held = Buffer.concat([this.#held, chunk]);
    if (this.#held.length >= this.#limit) this.#stream.pause();
    this.#wake();
  };

  readonly #onEnd = () => {
    this.#ended = true;
    this.#wake();
  };
}
