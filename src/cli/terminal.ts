import { Transform, type TransformCallback } from 'node:stream';

const CTRL_A = 0x01;
const HELP = '\r\nCtrl-A x  end the machine    Ctrl-A Ctrl-A  send Ctrl-A    Ctrl-A h  this help\r\n';

/**
 * What a person types, less the escape sequences: Ctrl-A then x, h or Ctrl-A (the keys of `qemu -nographic`). Ctrl-A and
 * anything else go to the guest as they are.
 */
export class EscapeFilter extends Transform {
  #escaped = false;
  readonly #onQuit: () => void;
  readonly #print: (text: string) => void;

  constructor(onQuit: () => void, print: (text: string) => void) {
    super();
    this.#onQuit = onQuit;
    this.#print = print;
  }

  override _transform(chunk: Buffer, _encoding: BufferEncoding, done: TransformCallback): void {
    const out: number[] = [];
    for (const byte of chunk) {
      if (!this.#escaped) {
        if (byte === CTRL_A) this.#escaped = true;
        else out.push(byte);
        continue;
      }
      this.#escaped = false;
      const key = String.fromCharCode(byte).toLowerCase();
      if (key === 'x') {
        this.#onQuit();
        break;
      }
      if (key === 'h' || key === '?') this.#print(HELP);
      else if (byte === CTRL_A) out.push(CTRL_A);
      else out.push(CTRL_A, byte);
    }
    done(null, Buffer.from(out));
  }
}

/**
 * Puts the terminal on stdin into raw mode, so that every key (Ctrl-C too) reaches the guest.
 * @returns a function that restores it; it also runs when the process exits, however it does short of SIGKILL.
 */
export function rawTerminal(): () => void {
  const { stdin } = process;
  if (!stdin.isTTY) return () => {};
  stdin.setRawMode(true);
  const again = () => stdin.setRawMode(true); // a shell's `fg` leaves the terminal cooked
  const restore = () => {
    process.removeListener('exit', restore);
    process.removeListener('SIGCONT', again);
    stdin.setRawMode(false);
  };
  process.once('exit', restore);
  process.on('SIGCONT', again);
  return restore;
}
