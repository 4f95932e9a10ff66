import type { Duplex } from 'node:stream';

/** Seconds to wait for what a busy host interprets; nothing is measured by it. */
const PATIENCE = 300;

/** A person at the guest's shell, over a byte stream. */
export class Console {
  readonly #stream: Duplex;
  #text = '';
  #seen = 0;

  constructor(stream: Duplex) {
    this.#stream = stream;
    stream.on('data', (chunk: Buffer) => {
      this.#text += chunk.toString('latin1');
    });
  }

  /** Waits for output that matches, after what was waited for before. @returns the output up to the end of the match. */
  async until(pattern: RegExp, seconds = PATIENCE): Promise<string> {
    for (const end = Date.now() + seconds * 1e3; Date.now() < end; ) {
      const rest = this.#text.slice(this.#seen);
      const match = pattern.exec(rest);
      if (match) {
        const length = match.index + match[0].length;
        this.#seen += length;
        return rest.slice(0, length);
      }
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    throw new Error(`the guest never printed ${pattern}; it printed:\n${this.#text.slice(-2000)}`);
  }

  prompt(seconds = PATIENCE): Promise<string> {
    // biome-ignore lint/suspicious/noControlCharactersInRegex: the shell asks the terminal where its cursor is
    return this.until(/# (\x1b\[6n)?$/, seconds);
  }

  /** Types a command and waits for the next prompt. @returns what it printed, with the echo of the command. */
  async run(command: string, seconds = PATIENCE): Promise<string> {
    this.#stream.write(`${command}\n`);
    return this.prompt(seconds);
  }
}
