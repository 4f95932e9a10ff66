// LZMA2 as in .xz (The .xz File Format, section 5.3.1; XZ Embedded's xz_dec_lzma2.c, public domain). The output buffer is
// also the dictionary. All probabilities live in one array, at these offsets.
const STATES = 12;
const POSITION_STATES = 16;
const IS_MATCH = 0;
const IS_REP = IS_MATCH + STATES * POSITION_STATES;
const IS_REP0 = IS_REP + STATES;
const IS_REP1 = IS_REP0 + STATES;
const IS_REP2 = IS_REP1 + STATES;
const IS_REP0_LONG = IS_REP2 + STATES;
const DISTANCE_SLOT = IS_REP0_LONG + STATES * POSITION_STATES;
const DISTANCE_SPECIAL = DISTANCE_SLOT + 4 * 64;
const DISTANCE_ALIGN = DISTANCE_SPECIAL + 128;
const MATCH_LENGTH = DISTANCE_ALIGN + 16;
// Inside a length coder.
const LENGTH_CHOICE2 = 1;
const LENGTH_LOW = 2;
const LENGTH_MID = LENGTH_LOW + POSITION_STATES * 8;
const LENGTH_HIGH = LENGTH_MID + POSITION_STATES * 8;
const LENGTH_SIZE = LENGTH_HIGH + 256;
const REP_LENGTH = MATCH_LENGTH + LENGTH_SIZE;
const LITERAL = REP_LENGTH + LENGTH_SIZE;
const LITERAL_CODER = 0x300;
const MAX_LITERAL_BITS = 4; // lc + lp

const MIN_MATCH = 2;
const FIRST_MODEL_SLOT = 4;
const FIRST_DIRECT_SLOT = 14;
const PROBABILITY_HALF = 1024;
const SIGN = 1 << 31; // int32 values compare as unsigned ones with this flipped

/** Decodes LZMA2 data; made once for a stream. Throws Error for data that is not valid, and never writes past `out`. */
export class Lzma2Decoder {
  readonly #input: Uint8Array;
  readonly #out: Uint8Array;
  readonly #probabilities = new Uint16Array(LITERAL + (LITERAL_CODER << MAX_LITERAL_BITS));
  #at = 0;
  #made = 0;
  #dictionaryStart = 0;
  // The range coder, as int32.
  #range = 0;
  #code = 0;
  // State of the LZMA decoder, which goes on from chunk to chunk unless the chunk resets it.
  #state = 0;
  #rep0 = 0;
  #rep1 = 0;
  #rep2 = 0;
  #rep3 = 0;
  #literalContextBits = 0;
  #literalPositionMask = 0;
  #positionMask = 0;

  constructor(input: Uint8Array, out: Uint8Array) {
    this.#input = input;
    this.#out = out;
  }

  /** Decodes the data of one block, which starts at `at` in the input and at `made` in the output. */
  decode(at: number, made: number): { inputEnd: number; outputEnd: number } {
    this.#at = at;
    this.#made = made;
    let needDictionary = true;
    let needProperties = true;
    for (;;) {
      const control = this.#byte();
      if (control === 0) return { inputEnd: this.#at, outputEnd: this.#made };
      if (control >= 0xe0 || control === 1) {
        this.#dictionaryStart = this.#made;
        needDictionary = false;
        needProperties = true;
      } else if (needDictionary) throw new Error('the first chunk does not reset the dictionary');

      if (control < 0x80) {
        if (control > 2) throw new Error('a chunk is of an unknown type');
        this.#copyChunk(this.#uint16() + 1);
        continue;
      }
      const size = ((control & 0x1f) << 16) + this.#uint16() + 1;
      const packedSize = this.#uint16() + 1;
      if (control >= 0xc0) {
        this.#setProperties(this.#byte());
        needProperties = false;
      } else if (needProperties) throw new Error('a chunk has no properties');
      if (control >= 0xa0) this.#reset();
      this.#lzmaChunk(size, packedSize);
    }
  }

  #byte(): number {
    const byte = this.#input[this.#at++];
    if (byte === undefined) throw new Error('the data ends early');
    return byte;
  }

  #uint16(): number {
    return (this.#byte() << 8) | this.#byte();
  }

  #copyChunk(size: number): void {
    const end = this.#at + size;
    if (end > this.#input.length) throw new Error('the data ends early');
    if (this.#made + size > this.#out.length) throw new Error('there is more data than the header says');
    this.#out.set(this.#input.subarray(this.#at, end), this.#made);
    this.#at = end;
    this.#made += size;
  }

  #setProperties(byte: number): void {
    const contextBits = byte % 9;
    const positionBits = Math.floor(byte / 9) % 5;
    const pb = Math.floor(byte / 45);
    if (pb > 4 || contextBits + positionBits > MAX_LITERAL_BITS) throw new Error('the properties are out of range');
    this.#literalContextBits = contextBits;
    this.#literalPositionMask = (1 << positionBits) - 1;
    this.#positionMask = (1 << pb) - 1;
  }

  #reset(): void {
    this.#state = 0;
    this.#rep0 = this.#rep1 = this.#rep2 = this.#rep3 = 0;
    this.#probabilities.fill(PROBABILITY_HALF);
  }

  #lzmaChunk(size: number, packedSize: number): void {
    const end = this.#made + size;
    const inputEnd = this.#at + packedSize;
    if (end > this.#out.length) throw new Error('there is more data than the header says');
    if (inputEnd > this.#input.length) throw new Error('the data ends early');
    this.#startRangeCoder();
    while (this.#made < end) {
      const positionState = this.#made & this.#positionMask;
      const contextState = this.#state * POSITION_STATES + positionState;
      if (this.#bit(IS_MATCH + contextState) === 0) this.#literal();
      else this.#copyMatch(this.#match(contextState, positionState), end);
      if (this.#at > inputEnd) throw new Error('a chunk ends early');
    }
    if (this.#at !== inputEnd || this.#code !== 0) throw new Error('a chunk does not end where it should');
  }

  #startRangeCoder(): void {
    if (this.#byte() !== 0) throw new Error('a chunk starts with a byte other than 0');
    this.#range = -1;
    this.#code = (this.#uint16() << 16) | this.#uint16();
  }

  /** Decodes one bit with the probability at `index`. */
  #bit(index: number): 0 | 1 {
    const probability = this.#probabilities[index] as number;
    const bound = Math.imul(this.#range >>> 11, probability);
    let bit: 0 | 1;
    if ((this.#code ^ SIGN) < (bound ^ SIGN)) {
      this.#range = bound;
      this.#probabilities[index] = probability + ((2048 - probability) >> 5);
      bit = 0;
    } else {
      this.#range = (this.#range - bound) | 0;
      this.#code = (this.#code - bound) | 0;
      this.#probabilities[index] = probability - (probability >> 5);
      bit = 1;
    }
    if ((this.#range & 0xff000000) === 0) this.#normalize();
    return bit;
  }

  #normalize(): void {
    this.#range <<= 8;
    // Past the input a 0 will do: the check after each symbol ends it.
    this.#code = (this.#code << 8) | (this.#input[this.#at++] ?? 0);
  }

  #directBits(count: number): number {
    let value = 0;
    for (let i = 0; i < count; i++) {
      this.#range >>>= 1;
      const below = (this.#code ^ SIGN) < (this.#range ^ SIGN);
      if (!below) this.#code = (this.#code - this.#range) | 0;
      value = (value << 1) | (below ? 0 : 1);
      if ((this.#range & 0xff000000) === 0) this.#normalize();
    }
    return value >>> 0;
  }

  #tree(base: number, bits: number): number {
    let symbol = 1;
    for (let i = 0; i < bits; i++) symbol = (symbol << 1) | this.#bit(base + symbol);
    return symbol - (1 << bits);
  }

  #reverseTree(base: number, bits: number): number {
    let symbol = 1;
    let value = 0;
    for (let i = 0; i < bits; i++) {
      const bit = this.#bit(base + symbol);
      symbol = (symbol << 1) | bit;
      value |= bit << i;
    }
    return value;
  }

  #literal(): void {
    const made = this.#made;
    const before = made > this.#dictionaryStart ? (this.#out[made - 1] as number) : 0;
    const context =
      ((made & this.#literalPositionMask) << this.#literalContextBits) + (before >> (8 - this.#literalContextBits));
    const base = LITERAL + LITERAL_CODER * context;
    let symbol = 1;
    if (this.#state >= 7) {
      // After a match, the byte that would have gone on with it selects the probabilities, as long as it is right.
      this.#checkDistance(this.#rep0);
      let matchByte = this.#out[made - this.#rep0 - 1] as number;
      while (symbol < 0x100) {
        const matchBit = (matchByte >> 7) & 1;
        matchByte <<= 1;
        const bit = this.#bit(base + ((1 + matchBit) << 8) + symbol);
        symbol = (symbol << 1) | bit;
        if (bit !== matchBit) break;
      }
    }
    while (symbol < 0x100) symbol = (symbol << 1) | this.#bit(base + symbol);
    this.#out[made] = symbol;
    this.#made = made + 1;
    this.#state = this.#state < 4 ? 0 : this.#state < 10 ? this.#state - 3 : this.#state - 6;
  }

  /** Decodes a match up to its length, which it returns; its distance is in rep0. */
  #match(contextState: number, positionState: number): number {
    const state = this.#state;
    if (this.#bit(IS_REP + state) === 0) {
      this.#rep3 = this.#rep2;
      this.#rep2 = this.#rep1;
      this.#rep1 = this.#rep0;
      this.#state = state < 7 ? 7 : 10;
      const length = this.#length(MATCH_LENGTH, positionState);
      this.#rep0 = this.#distance(length);
      return length;
    }
    if (this.#bit(IS_REP0 + state) === 0) {
      if (this.#bit(IS_REP0_LONG + contextState) === 0) {
        this.#state = state < 7 ? 9 : 11;
        return 1;
      }
    } else {
      let distance: number;
      if (this.#bit(IS_REP1 + state) === 0) distance = this.#rep1;
      else {
        if (this.#bit(IS_REP2 + state) === 0) distance = this.#rep2;
        else {
          distance = this.#rep3;
          this.#rep3 = this.#rep2;
        }
        this.#rep2 = this.#rep1;
      }
      this.#rep1 = this.#rep0;
      this.#rep0 = distance;
    }
    this.#state = state < 7 ? 8 : 11;
    return this.#length(REP_LENGTH, positionState);
  }

  #length(base: number, positionState: number): number {
    if (this.#bit(base) === 0) return MIN_MATCH + this.#tree(base + LENGTH_LOW + positionState * 8, 3);
    if (this.#bit(base + LENGTH_CHOICE2) === 0) {
      return MIN_MATCH + 8 + this.#tree(base + LENGTH_MID + positionState * 8, 3);
    }
    return MIN_MATCH + 16 + this.#tree(base + LENGTH_HIGH, 8);
  }

  #distance(length: number): number {
    const slot = this.#tree(DISTANCE_SLOT + Math.min(length - MIN_MATCH, 3) * 64, 6);
    if (slot < FIRST_MODEL_SLOT) return slot;
    const bits = (slot >> 1) - 1;
    const high = ((2 | (slot & 1)) << bits) >>> 0;
    // The trees of the special slots overlap so that each starts at its own `high - slot`.
    if (slot < FIRST_DIRECT_SLOT) return high + this.#reverseTree(DISTANCE_SPECIAL + high - slot, bits);
    return high + this.#directBits(bits - 4) * 16 + this.#reverseTree(DISTANCE_ALIGN, 4);
  }

  #copyMatch(length: number, end: number): void {
    const made = this.#made;
    this.#checkDistance(this.#rep0);
    if (made + length > end) throw new Error('a match runs past its chunk');
    const out = this.#out;
    const source = made - this.#rep0 - 1;
    for (let i = 0; i < length; i++) out[made + i] = out[source + i] as number; // may overlap: byte by byte
    this.#made = made + length;
  }

  #checkDistance(distance: number): void {
    if (distance >= this.#made - this.#dictionaryStart) throw new Error('a match reaches before the data');
  }
}
