const ESC = 0x1b;
const BEL = 0x07;
const DEL = 0x7f;
/** In UTF-8, the first byte of U+0080 to U+009F, which are controls as well: U+009B is ESC [. */
const C1_LEAD = 0xc2;
/** Text goes on after so much of a sequence that does not end. */
const MAX_SEQUENCE = 64;
const LAYOUT = new Set([...'\b\t\n\r'].map((character) => character.charCodeAt(0)));

type State = 'text' | 'C1' | 'escape' | 'sequence' | 'string';

/**
 * What a guest's console said, for a terminal that is not its console: text, layout and colours. A terminal answers some
 * control sequences as if the user had typed that, and of others the user's screen would not recover.
 */
export class TerminalText {
  #state: State = 'text';
  /** The control sequence so far. */
  #sequence: number[] = [];

  /** @returns what of it may be shown; a sequence may end in the next piece. */
  push(piece: Uint8Array): Buffer {
    const shown: number[] = [];
    for (const byte of piece) this.#next(byte, shown);
    return Buffer.from(shown);
  }

  #next(byte: number, shown: number[]): void {
    if (byte === ESC) this.#state = 'escape';
    else if (this.#state === 'escape') this.#escape(byte);
    else if (this.#state === 'sequence') this.#inSequence(byte, shown);
    else if (this.#state === 'string') {
      if (byte === BEL || byte === 0x0a) this.#state = 'text';
    } else if (this.#state === 'C1') {
      this.#state = 'text';
      if (byte >= 0x80 && byte < 0xa0) this.#escape(byte - 0x40);
      else {
        shown.push(C1_LEAD);
        this.#next(byte, shown);
      }
    } else if (byte === C1_LEAD) this.#state = 'C1';
    else if ((byte >= 0x20 && byte !== DEL) || LAYOUT.has(byte)) shown.push(byte);
  }

  /** @param byte after ESC */
  #escape(byte: number): void {
    if (byte === 0x5b) {
      this.#state = 'sequence';
      this.#sequence = [];
    } else if (byte === 0x50 || byte === 0x58 || (byte >= 0x5d && byte <= 0x5f)) this.#state = 'string';
    else this.#state = byte >= 0x20 && byte < 0x30 ? 'escape' : 'text'; // ESC ( B has two bytes
  }

  #inSequence(byte: number, shown: number[]): void {
    if (byte >= 0x20 && byte < 0x40 && this.#sequence.length < MAX_SEQUENCE) {
      this.#sequence.push(byte);
      return;
    }
    if (byte === 0x6d && this.#sequence.every((it) => it < 0x3c)) shown.push(ESC, 0x5b, ...this.#sequence, byte);
    this.#state = 'text';
  }
}
