import { stripVTControlCharacters } from 'node:util';
import { onSignals } from './signals.js';

const FRAMES = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏'];
const ASCII_FRAMES = ['|', '/', '-', '\\'];
const FRAME_MS = 100;
/** What takes less is not worth a line, in milliseconds. */
const DELAY_MS = 300;
const CLEAR_LINE = '\r\x1b[K';

/**
 * One line on stderr that says what is being waited for, until it is disposed of. Nothing where stderr is not a terminal.
 * The cursor is not hidden, so that nothing has to be restored.
 */
export class Progress implements Disposable {
  readonly #start = performance.now();
  readonly #timer: NodeJS.Timeout | undefined;
  #text: string;
  #shown = false;
  #removeSignals = () => {};

  constructor(text: string) {
    this.#text = text;
    if (!process.stderr.isTTY || process.env.TERM === 'dumb') return;
    this.#timer = setInterval(() => this.#draw(), FRAME_MS);
    this.#removeSignals = onSignals(() => {
      this[Symbol.dispose]();
      return false;
    });
  }

  /** Says something else from the next frame on. */
  update(text: string): void {
    this.#text = text;
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
    this.#removeSignals();
    if (this.#shown) process.stderr.write(CLEAR_LINE);
    this.#shown = false;
  }

  #draw(): void {
    const elapsed = performance.now() - this.#start;
    if (elapsed < DELAY_MS) return;
    const { LC_ALL, LC_CTYPE, LANG } = process.env;
    const frames = /utf-?8/i.test(LC_ALL || LC_CTYPE || LANG || '') ? FRAMES : ASCII_FRAMES;
    const frame = frames[Math.floor(elapsed / FRAME_MS) % frames.length];
    const line = `${frame} ${stripVTControlCharacters(this.#text)}, ${Math.floor(elapsed / 1000)} s`;
    process.stderr.write(`${CLEAR_LINE}${line.replace(/\p{Cc}/gu, '?').slice(0, (process.stderr.columns || 80) - 1)}`);
    this.#shown = true;
  }
}
