import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import koffi from 'koffi';

const libc = koffi.load('libc.so.6');
const posixOpenpt = libc.func('int posix_openpt(int flags)');
const grantpt = libc.func('int grantpt(int fd)');
const unlockpt = libc.func('int unlockpt(int fd)');
const ptsnameR = libc.func('int ptsname_r(int fd, _Out_ uint8_t *name, size_t length)');
const ioctl = libc.func('int ioctl(int fd, unsigned long request, const uint16_t *size)');
const tcgetattr = libc.func('int tcgetattr(int fd, _Out_ uint8_t *termios)');

const O_RDWR = 2;
const O_NOCTTY = 0o400;
const O_NONBLOCK = 0o4000;
const TIOCSWINSZ = 0x5414;
const TERMIOS_SIZE = 60;

/** A pseudo-terminal: what a program under test has as its terminal, and the person's end of it. */
export class Pty implements Disposable {
  readonly #master: number;
  /** The terminal, for a child's stdio. */
  readonly slave: number;
  #output = '';

  constructor() {
    this.#master = posixOpenpt(O_RDWR | O_NOCTTY | O_NONBLOCK);
    if (this.#master < 0 || grantpt(this.#master) !== 0 || unlockpt(this.#master) !== 0) throw new Error('no pty');
    const name = new Uint8Array(64);
    if (ptsnameR(this.#master, name, name.length) !== 0) throw new Error('no pty name');
    this.slave = openSync(Buffer.from(name.subarray(0, name.indexOf(0))).toString(), O_RDWR | O_NOCTTY);
  }

  /** Sets the window's size. No SIGWINCH goes to a child that has it not as its controlling terminal. */
  resize(rows: number, columns: number): void {
    if (ioctl(this.#master, TIOCSWINSZ, Uint16Array.of(rows, columns, 0, 0)) !== 0) throw new Error('TIOCSWINSZ');
  }

  type(text: string): void {
    writeSync(this.#master, text);
  }

  /** Everything shown so far. */
  get screen(): string {
    const buffer = Buffer.alloc(65536);
    for (;;) {
      try {
        const count = readSync(this.#master, buffer);
        if (count === 0) return this.#output;
        this.#output += buffer.toString('latin1', 0, count);
      } catch {
        return this.#output;
      }
    }
  }

  /** Resolves when the screen shows this. @throws Error with the screen when it does not in time. */
  async shows(pattern: RegExp, seconds = 300): Promise<void> {
    for (const end = Date.now() + seconds * 1e3; Date.now() < end; ) {
      if (pattern.test(this.screen)) return;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    throw new Error(`the terminal never showed ${pattern}:\n${this.screen}`);
  }

  /** Presses Ctrl-C until the screen shows this: what is only being started may miss the first. @throws as shows() */
  async interrupt(pattern: RegExp, seconds = 300): Promise<void> {
    for (const end = Date.now() + seconds * 1e3; ; ) {
      this.type('\x03');
      try {
        return await this.shows(pattern, 2);
      } catch (error) {
        if (Date.now() > end) throw error;
      }
    }
  }

  /** The line discipline's settings, to compare. */
  get settings(): string {
    const termios = new Uint8Array(TERMIOS_SIZE);
    if (tcgetattr(this.slave, termios) !== 0) throw new Error('tcgetattr');
    return Buffer.from(termios).toString('hex');
  }

  [Symbol.dispose](): void {
    closeSync(this.#master);
    closeSync(this.slave);
  }
}
