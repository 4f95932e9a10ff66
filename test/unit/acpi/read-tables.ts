import type { GuestMemory } from '#dist/memory/guest-memory.js';

/** Reads ACPI tables as an OS does, by ACPI 6.4 alone: nothing here comes from the encoder. Everything wrong throws. */

export const sum = (bytes: Uint8Array) => bytes.reduce((total, byte) => (total + byte) & 0xff, 0);

const text = (bytes: Uint8Array) => Buffer.from(bytes).toString('latin1');

function check(condition: boolean, what: string): asserts condition {
  if (!condition) throw new Error(what);
}

export interface Table {
  readonly at: number;
  readonly revision: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
}

/** Follows the RSDP (section 5.2.5): every table by its signature. */
export function readTables(memory: GuestMemory, rsdp: number): Map<string, Table> {
  check(rsdp % 16 === 0 && rsdp >= 0xe0000 && rsdp < 0x100000, 'RSDP where no OS would search');
  const bytes = memory.slice(rsdp, 36);
  check(text(bytes.subarray(0, 8)) === 'RSD PTR ', 'RSDP signature');
  check(bytes[15] === 2 && memory.readU32(rsdp + 20) === 36, 'RSDP revision and length');
  check(sum(bytes.subarray(0, 20)) === 0 && sum(bytes) === 0, 'RSDP checksums');
  check(memory.readU32(rsdp + 16) === 0, 'RSDP has an RSDT');
  const tables = new Map<string, Table>();
  const add = (at: number) => {
    const signature = text(memory.slice(at, 4));
    const table = memory.slice(at, memory.readU32(at + 4));
    check(table.length >= 36 && sum(table) === 0, `${signature} length and checksum`);
    check(!tables.has(signature), `${signature} twice`);
    const view = new DataView(table.buffer, table.byteOffset, table.length);
    tables.set(signature, { at, revision: table[8] as number, bytes: table, view });
    return { signature, view };
  };
  const xsdt = add(Number(memory.readU64(rsdp + 24)));
  check(xsdt.signature === 'XSDT' && (xsdt.view.byteLength - 36) % 8 === 0, 'XSDT');
  for (let i = 36; i < xsdt.view.byteLength; i += 8) {
    const { signature, view } = add(Number(xsdt.view.getBigUint64(i, true)));
    if (signature === 'FACP') {
      check(view.getUint32(40, true) === 0, 'FADT has a 32-bit DSDT address');
      check(add(Number(view.getBigUint64(140, true))).signature === 'DSDT', 'X_DSDT');
    }
  }
  return tables;
}

/** The MADT's interrupt controller structures (section 5.2.12): type, and the bytes after type and length. */
export function readMadt({ bytes }: Table): { type: number; body: number[] }[] {
  const entries = [];
  for (let at = 44; at < bytes.length; ) {
    const [type, length] = [bytes[at] as number, bytes[at + 1] as number];
    check(length >= 2 && at + length <= bytes.length, 'MADT structure');
    entries.push({ type, body: [...bytes.subarray(at + 2, at + length)] });
    at += length;
  }
  return entries;
}

export type AmlValue = number | string | Uint8Array | AmlValue[];

export interface Name {
  readonly kind: 'name';
  readonly path: string;
  readonly value: AmlValue;
}

export interface Block {
  readonly kind: 'scope' | 'device';
  readonly path: string;
  readonly terms: Term[];
}

/** A method that only notifies. */
export interface Method {
  readonly kind: 'method';
  readonly path: string;
  readonly flags: number;
  readonly notifications: readonly { readonly path: string; readonly value: AmlValue }[];
}

/** A term of a definition block. */
export type Term = Name | Block | Method;

const isName = (term: Term): term is Name => term.kind === 'name';
const isMethod = (term: Term): term is Method => term.kind === 'method';

/** The names among the terms, the methods, and the blocks. */
export function sort(terms: readonly Term[]): { names: Name[]; methods: Method[]; blocks: Block[] } {
  const blocks = terms.filter((term): term is Block => !isName(term) && !isMethod(term));
  return { names: terms.filter(isName), methods: terms.filter(isMethod), blocks };
}

/** Parses AML (section 20.2) as far as the DSDT goes. */
export class AmlReader {
  readonly #bytes: Uint8Array;
  #at = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
  }

  terms(end = this.#bytes.length): Term[] {
    const terms: Term[] = [];
    while (this.#at < end) terms.push(this.#term());
    check(this.#at === end, 'a term goes beyond its package');
    return terms;
  }

  /** PkgLength: returns the end of what it counts. */
  packageEnd(): number {
    const start = this.#at;
    const lead = this.#byte();
    const following = lead >> 6;
    check(following === 0 || (lead & 0x30) === 0, 'reserved bits of PkgLength');
    let length = following === 0 ? lead & 0x3f : lead & 0xf;
    for (let i = 0; i < following; i++) length += this.#byte() * 2 ** (4 + 8 * i);
    check(start + length <= this.#bytes.length, 'PkgLength goes beyond the block');
    return start + length;
  }

  value(): AmlValue {
    const op = this.#byte();
    switch (op) {
      case 0x00:
      case 0x01:
        return op;
      case 0x0a:
        return this.#integer(1);
      case 0x0b:
        return this.#integer(2);
      case 0x0c:
        return this.#integer(4);
      case 0x0d: {
        const end = this.#bytes.indexOf(0, this.#at);
        const string = text(this.#take(end - this.#at));
        this.#at++;
        return string;
      }
      case 0x11: {
        const end = this.packageEnd();
        const size = this.value();
        check(size === end - this.#at, 'BufferSize');
        return this.#take(size as number);
      }
      case 0x12: {
        const end = this.packageEnd();
        const elements = Array.from({ length: this.#byte() }, () => this.value());
        check(this.#at === end, 'NumElements');
        return elements;
      }
    }
    throw new Error(`no data object starts with 0x${op.toString(16)}`);
  }

  #term(): Term {
    const op = this.#byte();
    if (op === 0x08) return { kind: 'name', path: this.#path(), value: this.value() };
    if (op === 0x14) return this.#method();
    const extended = op === 0x5b ? this.#byte() : 0;
    check(op === 0x10 || extended === 0x82, `no known term starts with 0x${op.toString(16)}`);
    const end = this.packageEnd();
    const path = this.#path();
    return { kind: op === 0x10 ? 'scope' : 'device', path, terms: this.terms(end) };
  }

  #method(): Method {
    const end = this.packageEnd();
    const path = this.#path();
    const flags = this.#byte();
    const notifications = [];
    while (this.#at < end) {
      check(this.#byte() === 0x86, 'a method does more than notify');
      notifications.push({ path: this.#path(), value: this.value() });
    }
    check(this.#at === end, 'a method goes beyond its package');
    return { kind: 'method', path, flags, notifications };
  }

  #path(): string {
    const root = this.#bytes[this.#at] === 0x5c ? text(this.#take(1)) : '';
    const segment = text(this.#take(4));
    check(/^[A-Z_][A-Z0-9_]{3}$/.test(segment), `NameSeg ${segment}`);
    return root + segment;
  }

  #integer(size: number): number {
    return this.#take(size).reduceRight((value, byte) => value * 256 + byte, 0);
  }

  #byte(): number {
    return this.#take(1)[0] as number;
  }

  #take(length: number): Uint8Array {
    check(length >= 0 && this.#at + length <= this.#bytes.length, 'the block ends within a term');
    this.#at += length;
    return this.#bytes.subarray(this.#at - length, this.#at);
  }
}

export type Resource =
  | { readonly kind: 'memory'; readonly writable: boolean; readonly base: number; readonly length: number }
  | {
      readonly kind: 'io';
      readonly decode: number;
      readonly min: number;
      readonly max: number;
      readonly length: number;
    }
  | {
      readonly kind: 'interrupt';
      readonly consumer: boolean;
      readonly trigger: 'edge' | 'level';
      readonly polarity: 'high' | 'low';
      readonly sharing: 'exclusive' | 'shared';
      readonly gsis: number[];
    };

/** Parses a resource template (section 6.4) that must end with its end tag. */
export function readResources(bytes: Uint8Array): Resource[] {
  const resources: Resource[] = [];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = 0; ; ) {
    const tag = view.getUint8(at);
    const length = tag & 0x80 ? view.getUint16(at + 1, true) : tag & 7;
    const body = at + (tag & 0x80 ? 3 : 1);
    at = body + length;
    check(at <= bytes.length, 'a descriptor goes beyond its template');
    if (tag === 0x79) {
      check(view.getUint8(body) === 0 && at === bytes.length, 'the end tag');
      return resources;
    }
    if (tag === 0x86 && length === 9) {
      const [base, size] = [view.getUint32(body + 1, true), view.getUint32(body + 5, true)];
      resources.push({ kind: 'memory', writable: view.getUint8(body) === 1, base, length: size });
    } else if (tag === 0x47) {
      const [min, max] = [view.getUint16(body + 1, true), view.getUint16(body + 3, true)];
      resources.push({
        kind: 'io',
        decode: view.getUint8(body) === 1 ? 16 : 10,
        min,
        max,
        length: view.getUint8(body + 6),
      });
    } else {
      check(tag === 0x89, `descriptor 0x${tag.toString(16)}`);
      const [flags, count] = [view.getUint8(body), view.getUint8(body + 1)];
      check(length === 2 + 4 * count && flags < 0x10, 'the interrupt descriptor');
      resources.push({
        kind: 'interrupt',
        consumer: (flags & 1) !== 0,
        trigger: flags & 2 ? 'edge' : 'level',
        polarity: flags & 4 ? 'low' : 'high',
        sharing: flags & 8 ? 'shared' : 'exclusive',
        gsis: Array.from({ length: count }, (_, i) => view.getUint32(body + 2 + 4 * i, true)),
      });
    }
  }
}
