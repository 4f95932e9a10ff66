import { type ChildProcess, fork } from 'node:child_process';
import { connect, createServer, type Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import type { MigrationProgress, MigrationResult } from '#dist/index.js';
import type { Stage } from '#dist/migration/stages.js';

export const KEY = 'a key for tests only';
/** Milliseconds for anything to happen: the host may have much else to do. */
const PATIENCE = 240_000;

export interface PeerConfig {
  readonly role: 'source' | 'target';
  /** Of a source: what it restores, and where its guest's disk goes. */
  readonly snapshot?: string;
  readonly overlay?: string;
  readonly key?: string;
  /** Of a target. */
  readonly address?: string;
  /** Where it is killed, or waits for goOn(). */
  readonly at?: Stage;
  readonly act?: 'kill' | 'wait';
  readonly options?: object;
}

/** What a peer says. */
export interface Message {
  readonly ready?: true;
  readonly listening?: string;
  readonly stage?: Stage;
  readonly pass?: number;
  readonly wrong?: string;
  readonly state?: string;
  readonly received?: string;
  readonly ended?: string;
  readonly migrated?: MigrationResult;
  readonly progress?: readonly MigrationProgress[];
  readonly failed?: { readonly code?: string; readonly message: string };
  readonly executed?: { readonly code: number; readonly stdout: string; readonly stderr: string };
  readonly output?: string;
  readonly exit?: unknown;
  readonly lost?: { readonly code: string; readonly message: string };
  readonly exited?: true;
}

/** A process that is one side of a migration. */
export class Peer implements AsyncDisposable {
  readonly said: Message[] = [];
  readonly #child: ChildProcess;
  #heard = () => {};

  constructor(config: PeerConfig) {
    const program = fileURLToPath(new URL('./peer.mjs', import.meta.url));
    this.#child = fork(program, [JSON.stringify({ key: KEY, ...config })]);
    this.#child.on('message', (message: Message) => this.#say(message));
    this.#child.on('exit', () => this.#say({ exited: true }));
  }

  get pid(): number {
    return this.#child.pid as number;
  }

  tell(what: string, more: object = {}): void {
    this.#child.send({ what, ...more });
  }

  /** The first message that has one of these, of those after `since`. */
  async hear(what: keyof Message | ((message: Message) => boolean), since = 0): Promise<Message> {
    const fits = typeof what === 'function' ? what : (message: Message) => message[what] !== undefined;
    const end = Date.now() + PATIENCE;
    for (;;) {
      const message = this.said.slice(since).find(fits);
      if (message) return message;
      const over = this.said.some(({ exited }) => exited) || this.said.slice(since).some(({ failed }) => failed);
      if (over || Date.now() > end) {
        throw new Error(`never said ${what}: ${JSON.stringify(this.said.filter(({ pass }) => !pass))}`);
      }
      await new Promise<void>((resolve) => {
        this.#heard = resolve;
        setTimeout(resolve, 500);
      });
    }
  }

  /** Resolves when its guest has made another two passes, of which the second cannot be from before. */
  async runs(): Promise<number> {
    const since = this.said.length;
    const { pass } = await this.hear('pass', since);
    const next = await this.hear((message) => (message.pass ?? 0) > (pass as number), since);
    return next.pass as number;
  }

  /** The highest pass that it has told of. */
  get lastPass(): number {
    return Math.max(0, ...this.said.map(({ pass }) => pass ?? 0));
  }

  kill(): void {
    this.#child.kill('SIGKILL');
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill();
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      await new Promise((resolve) => this.#child.once('exit', resolve));
    }
  }

  #say(message: Message): void {
    this.said.push(message);
    this.#heard();
  }
}

/** A network between two peers that can be cut. */
export class Cable implements AsyncDisposable {
  readonly #sockets = new Set<Socket>();
  readonly #server;
  #port = 0;

  private constructor(to: () => number) {
    this.#server = createServer((near) => {
      const far = connect(to(), '127.0.0.1');
      for (const [from, into] of [
        [near, far],
        [far, near],
      ] as const) {
        this.#sockets.add(from);
        from.on('error', () => {});
        from.on('close', () => into.destroy());
        from.pipe(into);
      }
    });
  }

  /** @param to the address of the far end, `tcp:127.0.0.1:PORT` */
  static async to(to: string): Promise<Cable> {
    const cable = new Cable(() => Number(to.split(':').at(-1)));
    await new Promise<void>((resolve) => cable.#server.listen(0, '127.0.0.1', resolve));
    cable.#port = (cable.#server.address() as { port: number }).port;
    return cable;
  }

  get address(): string {
    return `tcp:127.0.0.1:${this.#port}`;
  }

  /** Every connection breaks; new ones can be made. */
  cut(): void {
    for (const socket of this.#sockets) socket.destroy();
    this.#sockets.clear();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.close();
    this.cut();
  }
}
