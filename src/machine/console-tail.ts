/** Bytes kept: a kernel's panic message and the call trace after it. */
export const CONSOLE_TAIL_SIZE = 16 * 1024;
/** The word before the bytes: how many were ever written, modulo 2^32. */
const HEADER = 4;
const SIZE = HEADER + CONSOLE_TAIL_SIZE;

/**
 * The last of what a guest wrote to its console, in memory that both threads see: it can be read when the machine thread
 * has died.
 */
export class ConsoleTail {
  readonly buffer: SharedArrayBuffer;
  readonly #written: Uint32Array;
  readonly #bytes: Uint8Array;
  #mark = 0;

  /** @param buffer another's, to see the same. */
  constructor(buffer = new SharedArrayBuffer(SIZE)) {
    this.buffer = buffer;
    this.#written = new Uint32Array(buffer, 0, 1);
    this.#bytes = new Uint8Array(buffer, HEADER);
  }

  put(byte: number): void {
    const written = this.#written[0] as number;
    this.#bytes[written % CONSOLE_TAIL_SIZE] = byte;
    this.#written[0] = written + 1;
  }

  /** What is written from now on is of a new boot. */
  mark(): void {
    this.#mark = this.#written[0] as number;
  }

  /** What this boot has written, as far as it is kept. */
  sinceMark(): string {
    const length = ((this.#written[0] as number) - this.#mark) >>> 0;
    return this.#last(Math.min(length, CONSOLE_TAIL_SIZE));
  }

  /** The last lines, without control characters; the guest chose them. */
  lines(count: number): string[] {
    const written = this.#written[0] as number;
    const lines = this.#last(Math.min(written, CONSOLE_TAIL_SIZE)).split('\n');
    return lines
      .map((line) => line.trimEnd())
      .filter((line) => line !== '')
      .slice(-count);
  }

  /** All that is kept, as the guest wrote it. */
  bytes(): Buffer {
    return this.#copy(Math.min(this.#written[0] as number, CONSOLE_TAIL_SIZE));
  }

  #last(length: number): string {
    return printable(this.#copy(length).toString('utf8'));
  }

  #copy(length: number): Buffer {
    const end = this.#written[0] as number;
    const copy = Buffer.alloc(length);
    for (let i = 0; i < length; i++) copy[i] = this.#bytes[((end - length + i) >>> 0) % CONSOLE_TAIL_SIZE] as number;
    return copy;
  }
}

/** Keeps line ends and tabs; leaves out escape sequences of terminals and other control characters. */
function printable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: that is what is left out
  return text.replace(/\x1b\[[0-9;?]*[A-Za-z]|[\0-\x08\x0b-\x1f\x7f-\x9f]/g, '');
}
