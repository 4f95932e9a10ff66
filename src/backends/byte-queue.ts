/** Bytes shorter than this are copied together: a queue of many short pieces would hold more overhead than data. */
const COPY_BELOW = 2048;
const SMALLEST_SLAB = 2048;
const LARGEST_SLAB = 16 * 1024;

/**
 * A first-in first-out queue of bytes that can be read more than once before they are consumed. Long pieces are kept as
 * they are, without a copy; short ones, and those that would keep a much larger buffer alive, are copied into slabs. The
 * memory held is thus at most about four times the length, and a slab.
 */
export class ByteQueue {
  #pieces: Uint8Array[] = [];
  /** Bytes of the first piece that are consumed. */
  #consumed = 0;
  #length = 0;
  /** The buffer behind the last piece when that piece may grow. */
  #slab: Uint8Array | undefined;
  #slabUsed = 0;
  #slabStart = 0;

  get length(): number {
    return this.#length;
  }

  /** Appends bytes, which must not change any more. */
  push(bytes: Uint8Array): void {
    if (bytes.length === 0) return;
    this.#length += bytes.length;
    if (bytes.length >= COPY_BELOW && bytes.length * 4 >= bytes.buffer.byteLength) {
      this.#pieces.push(bytes);
      this.#slab = undefined;
      return;
    }
    for (let at = 0; at < bytes.length; ) at += this.#copy(bytes, at);
  }

  #copy(bytes: Uint8Array, at: number): number {
    if (!this.#slab || this.#slabUsed === this.#slab.length) {
      this.#slab = Buffer.allocUnsafeSlow(Math.max(SMALLEST_SLAB, Math.min(LARGEST_SLAB, this.#length)));
      this.#slabStart = this.#slabUsed = 0;
      this.#pieces.push(this.#slab); // replaced below
    }
    const slab = this.#slab;
    const count = Math.min(bytes.length - at, slab.length - this.#slabUsed);
    slab.set(count === bytes.length ? bytes : bytes.subarray(at, at + count), this.#slabUsed);
    this.#slabUsed += count;
    this.#pieces[this.#pieces.length - 1] = slab.subarray(this.#slabStart, this.#slabUsed);
    return count;
  }

  /** Calls `visit` with views of the bytes [offset, offset + length). */
  read(offset: number, length: number, visit: (part: Uint8Array) => void): void {
    let skip = offset + this.#consumed;
    let left = length;
    for (const piece of this.#pieces) {
      if (left === 0) return;
      if (skip >= piece.length) {
        skip -= piece.length;
        continue;
      }
      const count = Math.min(left, piece.length - skip);
      visit(skip === 0 && count === piece.length ? piece : piece.subarray(skip, skip + count));
      skip = 0;
      left -= count;
    }
  }

  /** Copies the bytes [offset, offset + length) to `into` at `at`. */
  copyTo(into: Uint8Array, at: number, offset: number, length: number): void {
    let position = at;
    this.read(offset, length, (part) => {
      into.set(part, position);
      position += part.length;
    });
  }

  /** A copy of all. */
  toBuffer(): Buffer {
    const all = Buffer.allocUnsafeSlow(this.#length);
    this.copyTo(all, 0, 0, this.#length);
    return all;
  }

  /** Drops bytes from the front. */
  consume(count: number): void {
    this.#length -= count;
    let left = count + this.#consumed;
    let whole = 0;
    for (const piece of this.#pieces) {
      if (left < piece.length) break;
      left -= piece.length;
      whole++;
    }
    if (whole > 0) this.#pieces.splice(0, whole);
    this.#consumed = left;
    if (this.#pieces.length === 0) this.#slab = undefined;
  }

  clear(): void {
    this.#pieces = [];
    this.#slab = undefined;
    this.#consumed = 0;
    this.#length = 0;
  }
}
