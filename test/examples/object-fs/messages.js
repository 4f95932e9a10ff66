// @ts-check

/** A 9P message that ends too early, or one that a server refuses; `code` is Linux's errno. */
export class NinePError extends Error {
  /** @param {number} code */
  constructor(code) {
    super(`errno ${code}`);
    this.code = code;
  }
}

const EPROTO = 71;

/** Takes a 9P message apart: little-endian integers and strings with a 16-bit length. */
export class Reader {
  #at = 0;
  #bytes;
  #view;

  /** @param {Uint8Array} bytes */
  constructor(bytes) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  u8() {
    return this.#view.getUint8(this.#take(1));
  }

  u16() {
    return this.#view.getUint16(this.#take(2), true);
  }

  u32() {
    return this.#view.getUint32(this.#take(4), true);
  }

  /** Exact below 2^53. */
  u64() {
    return Number(this.#view.getBigUint64(this.#take(8), true));
  }

  text() {
    return Buffer.from(this.bytes(this.u16())).toString();
  }

  /** @param {number} length */
  bytes(length) {
    const at = this.#take(length);
    return this.#bytes.subarray(at, at + length);
  }

  /** @param {number} length */
  #take(length) {
    const at = this.#at;
    this.#at += length;
    if (this.#at > this.#bytes.length) throw new NinePError(EPROTO);
    return at;
  }
}

/** Puts a 9P message together. */
export class Writer {
  /** @type {Buffer[]} */
  #parts = [];
  length = 0;

  /** @param {number} value */
  u8(value) {
    return this.bytes(Uint8Array.of(value));
  }

  /** @param {number} value */
  u16(value) {
    return this.bytes(Uint8Array.of(value, value >> 8));
  }

  /** @param {number} value */
  u32(value) {
    const part = Buffer.alloc(4);
    part.writeUInt32LE(value);
    return this.bytes(part);
  }

  /** @param {number | bigint} value */
  u64(value) {
    const part = Buffer.alloc(8);
    part.writeBigUInt64LE(BigInt(value));
    return this.bytes(part);
  }

  /** @param {string} text */
  text(text) {
    const part = Buffer.from(text);
    return this.u16(part.length).bytes(part);
  }

  /** @param {Uint8Array} part */
  bytes(part) {
    this.#parts.push(Buffer.from(part));
    this.length += part.length;
    return this;
  }

  /** A whole message. @param {number} type @param {number} tag */
  message(type, tag) {
    const header = new Writer()
      .u32(7 + this.length)
      .u8(type)
      .u16(tag);
    return Buffer.concat([...header.#parts, ...this.#parts]);
  }
}
