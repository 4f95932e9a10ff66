import { Duplex } from 'node:stream';

type Callback = (error?: Error | null) => void;

/** What a stream's connection does for it: the methods of a Duplex with the same names. */
export interface StreamSource {
  readonly localPort: number;
  readonly remotePort: number;
  read(): void;
  write(bytes: Uint8Array, done: Callback): void;
  final(done: Callback): void;
  destroy(error: Error | null): void;
}

/**
 * A connection between host and guest, with back-pressure both ways. end() tells the guest that no more data comes, and
 * the guest's data still does; the other way round too. A stream that is destroyed before both sides have ended resets
 * the connection. Fails with a VsockError when the guest resets it, and with the error of the machine's end.
 */
export class VsockStream extends Duplex {
  /** Port of the host. */
  readonly localPort: number;
  /** Port of the guest. */
  readonly remotePort: number;
  readonly #source: StreamSource;

  /** @internal */
  constructor(source: StreamSource) {
    super();
    this.on('error', () => {}); // a connection that fails is no reason for the process to end
    this.#source = source;
    this.localPort = source.localPort;
    this.remotePort = source.remotePort;
  }

  /** @internal */
  override _read(): void {
    this.#source.read();
  }

  /** @internal */
  override _write(chunk: Buffer, _encoding: BufferEncoding, done: Callback): void {
    this.#source.write(chunk, done);
  }

  /** @internal */
  override _writev(chunks: { chunk: Buffer }[], done: Callback): void {
    this.#source.write(Buffer.concat(chunks.map(({ chunk }) => chunk)), done);
  }

  /** @internal */
  override _final(done: Callback): void {
    this.#source.final(done);
  }

  /** @internal */
  override _destroy(error: Error | null, done: Callback): void {
    this.#source.destroy(error);
    done(error);
  }
}
