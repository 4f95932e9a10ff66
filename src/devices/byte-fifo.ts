/** A first-in first-out queue of at most 16 bytes, without allocation after construction. */
export class ByteFifo {
  static readonly CAPACITY = 16;

  readonly #bytes = new Uint8Array(ByteFifo.CAPACITY);
  #head = 0;
  #length = 0;

  get length(): number {
    return this.#length;
  }

  /** Appends a byte. @returns false when full: the byte is not taken. */
  push(byte: number): boolean {
    if (this.#length === ByteFifo.CAPACITY) return false;
    this.#bytes[(this.#head + this.#length++) % ByteFifo.CAPACITY] = byte;
    return true;
  }

  /** The oldest byte; 0 when empty. */
  peek(): number {
    return this.#length === 0 ? 0 : (this.#bytes[this.#head] as number);
  }

  /** Removes and returns the oldest byte; 0 when empty. */
  shift(): number {
    if (this.#length === 0) return 0;
    const byte = this.#bytes[this.#head] as number;
    this.#head = (this.#head + 1) % ByteFifo.CAPACITY;
    this.#length--;
    return byte;
  }

  clear(): void {
    this.#length = 0;
  }

  /** The bytes, oldest first. */
  toArray(): number[] {
    return Array.from({ length: this.#length }, (_, i) => this.#bytes[(this.#head + i) % ByteFifo.CAPACITY] as number);
  }

  /** Replaces the contents; what does not fit is dropped. */
  load(bytes: readonly number[]): void {
    this.#length = 0;
    for (const byte of bytes) this.push(byte);
  }
}
