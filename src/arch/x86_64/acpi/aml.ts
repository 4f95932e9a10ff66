/**
 * AML, the byte code of ACPI's definition blocks (ACPI 6.4 section 20.2), as far as a description of fixed devices
 * needs it: each function encodes one term to its bytes.
 */
export type Aml = readonly number[];

// Section 20.2, the opcodes.
const ZERO_OP = 0x00;
const ONE_OP = 0x01;
const NAME_OP = 0x08;
const BYTE_PREFIX = 0x0a;
const WORD_PREFIX = 0x0b;
const DWORD_PREFIX = 0x0c;
const STRING_PREFIX = 0x0d;
const SCOPE_OP = 0x10;
const BUFFER_OP = 0x11;
const PACKAGE_OP = 0x12;
const METHOD_OP = 0x14;
const NOTIFY_OP = 0x86;
const ROOT_CHAR = 0x5c;
const EXT_OP_PREFIX = 0x5b;
const DEVICE_OP = 0x82;

// Section 6.4, the resource descriptors: an item's first byte, and its length where the item is a large one.
const IO_PORT = 0x47;
const END_TAG = 0x79;
const MEMORY32_FIXED = [0x86, 9, 0];
const EXTENDED_INTERRUPT = [0x89, 6, 0];

const DECODES_16_BITS = 1;
const READ_WRITE = 1;
const CONSUMER = 1;
const EDGE_TRIGGERED = 1 << 1; // else level
const SHARED = 1 << 3; // else exclusive; bit 2 clear is active high

/** An integer of 0 to 2^32 - 1 in as few bytes as it needs (ConstObj and ConstInteger). */
export function integer(value: number): Aml {
  if (value === 0) return [ZERO_OP];
  if (value === 1) return [ONE_OP];
  if (value < 2 ** 8) return [BYTE_PREFIX, ...littleEndian(value, 1)];
  if (value < 2 ** 16) return [WORD_PREFIX, ...littleEndian(value, 2)];
  return [DWORD_PREFIX, ...littleEndian(value, 4)];
}

/** Text of ASCII characters. */
export function string(text: string): Aml {
  return [STRING_PREFIX, ...ascii(text), 0];
}

/** An EISA ID such as PNP0501: three letters of 5 bits and four hexadecimal digits, most significant byte first. */
export function eisaId(id: string): Aml {
  const [a, b, c] = ascii(id).map((code) => code - 0x40) as [number, number, number];
  const letters = (a << 10) | (b << 5) | c;
  const digits = Number.parseInt(id.slice(3), 16);
  return [DWORD_PREFIX, letters >> 8, letters & 0xff, digits >> 8, digits & 0xff];
}

/** Name(path, value): a segment of four characters, of the root if a backslash goes before. */
export function name(path: string, value: Aml): Aml {
  return [NAME_OP, ...nameString(path), ...value];
}

/** Scope(path) { terms } */
export function scope(path: string, ...terms: Aml[]): Aml {
  return [SCOPE_OP, ...packaged([...nameString(path), ...terms.flat()])];
}

/** Device(segment) { terms } */
export function device(segment: string, ...terms: Aml[]): Aml {
  return [EXT_OP_PREFIX, DEVICE_OP, ...packaged([...nameString(segment), ...terms.flat()])];
}

/** Method(segment, argumentCount, Serialized) { terms }: one thread at a time. */
export function method(segment: string, argumentCount: number, ...terms: Aml[]): Aml {
  const SERIALIZED = 1 << 3;
  return [METHOD_OP, ...packaged([...nameString(segment), argumentCount | SERIALIZED, ...terms.flat()])];
}

/** Notify(path, value) */
export function notify(path: string, value: number): Aml {
  return [NOTIFY_OP, ...nameString(path), ...integer(value)];
}

/** Package() { elements } */
export function packageOf(...elements: Aml[]): Aml {
  return [PACKAGE_OP, ...packaged([elements.length, ...elements.flat()])];
}

/** ResourceTemplate() { descriptors }: a buffer that ends with an end tag, whose checksum 0 stands for none. */
export function resourceTemplate(...descriptors: Aml[]): Aml {
  const bytes = [...descriptors.flat(), END_TAG, 0];
  return [BUFFER_OP, ...packaged([...integer(bytes.length), ...bytes])];
}

/** IO(Decode16, …) of fixed ports (section 6.4.2.5). */
export function ioPorts(base: number, length: number): Aml {
  const address = littleEndian(base, 2);
  return [IO_PORT, DECODES_16_BITS, ...address, ...address, 1, ...littleEndian(length, 1)];
}

/** Memory32Fixed(ReadWrite, …) (section 6.4.3.4). */
export function memory32(base: number, length: number): Aml {
  return [...MEMORY32_FIXED, READ_WRITE, ...littleEndian(base, 4), ...littleEndian(length, 4)];
}

/** Interrupt(ResourceConsumer, …, ActiveHigh, …) of one GSI: edge and exclusive, or level and shared. */
export function interrupt(gsi: number, trigger: 'edge' | 'level'): Aml {
  const flags = CONSUMER | (trigger === 'edge' ? EDGE_TRIGGERED : SHARED);
  return [...EXTENDED_INTERRUPT, flags, 1, ...littleEndian(gsi, 4)];
}

/**
 * PkgLength and what it counts, itself included (section 20.2.4): up to 63 in one byte; otherwise its low 4 bits, under
 * the number of bytes that follow with 8 more bits each.
 */
export function packaged(content: Aml): Aml {
  const single = content.length + 1;
  if (single < 2 ** 6) return [single, ...content];
  const following = [1, 2, 3].find((n) => content.length + 1 + n < 2 ** (4 + 8 * n));
  if (following === undefined) throw new RangeError(`${content.length} bytes are too many for an AML package`);
  const total = content.length + 1 + following;
  return [(following << 6) | (total & 0xf), ...littleEndian(total >>> 4, following), ...content];
}

function nameString(path: string): Aml {
  return path.startsWith('\\') ? [ROOT_CHAR, ...ascii(path.slice(1))] : ascii(path);
}

function ascii(text: string): number[] {
  return Array.from(text, (character) => character.charCodeAt(0));
}

function littleEndian(value: number, size: number): number[] {
  if (!(Number.isInteger(value) && value >= 0 && value < 2 ** (8 * size))) {
    throw new RangeError(`${value} does not fit ${size} bytes of AML`);
  }
  return Array.from({ length: size }, (_, i) => Math.floor(value / 2 ** (8 * i)) & 0xff);
}
