import { spawnSync } from 'node:child_process';
import { Transform, type TransformCallback } from 'node:stream';

const CTRL_A = 0x01;

/** What Ctrl-A and a key do, by the key in lower case. */
export type EscapeKeys = Readonly<Record<string, { readonly does: string; readonly run: () => void }>>;

/**
 * What a person types, less the escape sequences: Ctrl-A then one of the keys, h for help, or Ctrl-A (as in
 * `qemu -nographic`). Ctrl-A and anything else go to the guest as they are.
 */
export class EscapeFilter extends Transform {
  #escaped = false;
  readonly #keys: EscapeKeys;
  readonly #print: (text: string) => void;

  constructor(keys: EscapeKeys, print: (text: string) => void) {
    super();
    this.#keys = keys;
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
      if (Object.hasOwn(this.#keys, key)) {
        this.#keys[key]?.run();
        break;
      }
      if (key === 'h' || key === '?') this.#print(this.#help());
      else if (byte === CTRL_A) out.push(CTRL_A);
      else out.push(CTRL_A, byte);
    }
    done(null, Buffer.from(out));
  }

  #help(): string {
    const keys = Object.entries(this.#keys).map(([key, { does }]) => `Ctrl-A ${key}  ${does}    `);
    return `\r\n${keys.join('')}Ctrl-A Ctrl-A  send Ctrl-A    Ctrl-A h  this help\r\n`;
  }
}

/**
 * Puts the terminal on stdin into raw mode, so that every key (Ctrl-C too) reaches the guest, and what the guest's own
 * terminal made of its output is shown as it is.
 * @returns a function that restores it; it also runs when the process exits, however it does short of SIGKILL.
 */
export function rawTerminal(): () => void {
  const { stdin } = process;
  if (!stdin.isTTY) return () => {};
  const set = () => {
    stdin.setRawMode(false); // what is set already is not set again, though a shell's `fg` has changed it
    stdin.setRawMode(true);
    // Node's raw mode goes on turning line feeds into new lines: full-screen programs move down by them.
    spawnSync('stty', ['-opost'], { stdio: ['inherit', 'ignore', 'ignore'] });
  };
  set();
  const restore = () => {
    process.removeListener('exit', restore);
    process.removeListener('SIGCONT', set);
    stdin.setRawMode(false);
  };
  process.once('exit', restore);
  process.on('SIGCONT', set);
  return restore;
}
