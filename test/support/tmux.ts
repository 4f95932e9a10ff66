import { execFileSync } from 'node:child_process';
import { setTimeout as delay } from 'node:timers/promises';

/** A terminal that tmux emulates, with a shell: what a person sees and types. */
export class Tmux implements Disposable {
  readonly #socket = `tsvisor-test-${process.pid}`;

  constructor(columns: number, rows: number) {
    this.#run('-f', '/dev/null', 'new-session', '-d', '-x', `${columns}`, '-y', `${rows}`, 'sh');
  }

  /** Types keys: text, or a key's name as `Enter`, `Escape`, `C-c`; each as if a person had pressed it. */
  async type(...keys: string[]): Promise<void> {
    for (const key of keys) {
      this.#run('send-keys', key);
      await delay(200);
    }
  }

  resize(columns: number, rows: number): void {
    this.#run('resize-window', '-x', `${columns}`, '-y', `${rows}`);
  }

  get screen(): string {
    return this.#run('capture-pane', '-p');
  }

  /** Resolves when the screen shows this. @throws Error with the screen when it does not in time. */
  async shows(pattern: RegExp, seconds = 300): Promise<void> {
    for (const end = Date.now() + seconds * 1e3; !pattern.test(this.screen); await delay(100)) {
      if (Date.now() > end) throw new Error(`the terminal never showed ${pattern}:\n${this.screen}`);
    }
  }

  [Symbol.dispose](): void {
    this.#run('kill-server');
  }

  #run(...args: string[]): string {
    return execFileSync('tmux', ['-L', this.#socket, ...args], { encoding: 'utf8' });
  }
}
