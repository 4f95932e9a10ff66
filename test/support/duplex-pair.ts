import { Duplex } from 'node:stream';

class End extends Duplex {
  other!: End;
  #done: (() => void) | undefined;

  override _read(): void {
    const done = this.#done;
    this.#done = undefined;
    done?.();
  }

  override _write(chunk: Buffer, _encoding: string, done: () => void): void {
    this.other.#take(chunk, done);
  }

  override _final(done: () => void): void {
    this.other.push(null);
    done();
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    if (!this.other.destroyed) process.nextTick(() => this.other.destroy());
    done(error);
  }

  #take(chunk: Buffer, done: () => void): void {
    if (this.push(chunk)) done();
    else this.#done = done;
  }
}

/** Two streams, each the other's far end, with back-pressure (as stream.duplexPair of later Nodes). */
export function duplexPair(): [Duplex, Duplex] {
  const [a, b] = [new End(), new End()];
  a.other = b;
  b.other = a;
  return [a, b];
}
