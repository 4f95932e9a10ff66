import { SnapshotError } from './errors.js';

/**
 * Reads saved state, which may be anybody's input, field by field. Whatever is not as it should be throws a
 * SnapshotError that names the field.
 */
export class StateReader {
  readonly #value: unknown;
  readonly #path: string;

  /** @param path for messages, as `devices.serial`. */
  constructor(value: unknown, path: string) {
    this.#value = value;
    this.#path = path;
  }

  /** An object's field as an object of its own. */
  object(name: string): StateReader {
    const value = this.#get(name);
    const path = this.#sub(name);
    if (typeof value !== 'object' || value === null || Array.isArray(value)) fail(path, 'is not an object');
    return new StateReader(value, path);
  }

  /** Whether a field is there. */
  has(name: string): boolean {
    return this.#get(name) !== undefined;
  }

  /** A whole number from minimum to maximum. */
  number(name: string, minimum: number, maximum: number): number {
    return wholeNumber(this.#get(name), this.#sub(name), minimum, maximum);
  }

  boolean(name: string): boolean {
    const value = this.#get(name);
    if (typeof value !== 'boolean') fail(this.#sub(name), 'is neither true nor false');
    return value;
  }

  /** @param limit most characters. */
  text(name: string, limit: number): string {
    const value = this.#get(name);
    if (typeof value !== 'string' || value.length > limit) fail(this.#sub(name), `is no text of at most ${limit}`);
    return value;
  }

  /** An unsigned number of so many bits, saved in hexadecimal. */
  bigint(name: string, bits = 64): bigint {
    const value = this.#get(name);
    if (typeof value !== 'string' || value.length > bits / 4 || !/^[0-9a-f]+$/.test(value)) {
      fail(this.#sub(name), `is no hexadecimal number of ${bits} bits`);
    }
    return BigInt(`0x${value}`);
  }

  /** Bytes, saved in base64. */
  bytes(name: string, minimum: number, maximum = minimum): Uint8Array {
    const value = this.#get(name);
    const size = minimum === maximum ? String(minimum) : `${minimum} to ${maximum}`;
    if (typeof value !== 'string' || value.length > 4 * Math.ceil(maximum / 3)) {
      fail(this.#sub(name), `is not ${size} bytes`);
    }
    const bytes = new Uint8Array(Buffer.from(value, 'base64'));
    if (bytes.length < minimum || bytes.length > maximum) fail(this.#sub(name), `is not ${size} bytes`);
    return bytes;
  }

  /** The elements of an array, each an object. */
  list(name: string, limit: number): StateReader[] {
    return this.#array(name, limit).map((value, index) => {
      const path = `${this.#sub(name)}[${index}]`;
      if (typeof value !== 'object' || value === null || Array.isArray(value)) fail(path, 'is not an object');
      return new StateReader(value, path);
    });
  }

  /** As list(), of exactly so many elements. */
  listOf(name: string, count: number): StateReader[] {
    const all = this.list(name, count);
    return all.length === count ? all : this.refuse(name, `has ${all.length} elements, not ${count}`);
  }

  /** An array of whole numbers. */
  numbers(name: string, limit: number, minimum: number, maximum: number): number[] {
    return this.#array(name, limit).map((value, index) =>
      wholeNumber(value, `${this.#sub(name)}[${index}]`, minimum, maximum),
    );
  }

  /** What was saved, as it is: for who checks it himself. */
  raw(name: string): unknown {
    return this.#get(name);
  }

  /** Refuses what was read. */
  refuse(name: string, what: string): never {
    fail(this.#sub(name), what);
  }

  #array(name: string, limit: number): unknown[] {
    const value = this.#get(name);
    if (!Array.isArray(value) || value.length > limit) fail(this.#sub(name), `is no list of at most ${limit}`);
    return value;
  }

  #get(name: string): unknown {
    const value = this.#value;
    if (typeof value !== 'object' || value === null || !Object.hasOwn(value, name)) return undefined;
    return (value as Record<string, unknown>)[name];
  }

  #sub(name: string): string {
    return this.#path === '' ? name : `${this.#path}.${name}`;
  }
}

/** Bytes as StateReader reads them. */
export function bytesToState(bytes: Uint8Array | DataView | BigUint64Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('base64');
}

function wholeNumber(value: unknown, path: string, minimum: number, maximum: number): number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < minimum || value > maximum) {
    fail(path, `is not a whole number from ${minimum} to ${maximum}`);
  }
  return value;
}

function fail(path: string, what: string): never {
  throw new SnapshotError(`snapshot: ${path} ${what}; the snapshot is damaged or of another version`);
}
