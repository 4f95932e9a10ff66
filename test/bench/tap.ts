import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { compileReference } from './compile.js';

const TAP = 'bench0';

/** More than the flood keeps in it. */
const QUEUE = 4096;

/**
 * A tap in a network namespace of its own, in which no other traffic is and nothing of the host is changed. A process
 * that waits for its input holds the namespace: it ends with this one however that ends, and the namespace with it.
 */
export class Tap implements Disposable {
  readonly name = TAP;
  readonly #holder: ChildProcess;

  private constructor(holder: ChildProcess) {
    this.#holder = holder;
  }

  /** @throws Error where there is no `ip` or `unshare`, or no right to use them. */
  static async open(): Promise<Tap> {
    const add = `ip tuntap add dev ${TAP} mode tap`;
    const up = `ip link set dev ${TAP} addrgenmode none txqueuelen ${QUEUE} up`;
    const script = `${add} && ${up} && echo ready && read end`;
    const holder = spawn('unshare', ['--net', 'sh', '-c', script], { stdio: ['pipe', 'pipe', 'pipe'] });
    let errors = '';
    holder.stderr.setEncoding('utf8').on('data', (text) => {
      errors += text;
    });
    const ready = once(holder.stdout, 'data').then(() => true);
    const ended = once(holder, 'close').then(() => false); // an `error` event rejects it
    if (await Promise.race([ready, ended])) return new Tap(holder);
    throw new Error(errors.trim().split('\n')[0]);
  }

  /** The words that come before a command for it to run where the tap is. */
  get prefix(): [string, ...string[]] {
    return ['nsenter', `--net=/proc/${this.#holder.pid}/ns/net`];
  }

  /** How many frames have come out of a guest so far. */
  async received(): Promise<number> {
    const table = await readFile(`/proc/${this.#holder.pid}/net/dev`, 'utf8');
    const packets = new RegExp(`${TAP}: *\\d+ +(\\d+)`).exec(table)?.[1];
    if (packets === undefined) throw new Error(`the tap ${TAP} is gone`);
    return Number(packets);
  }

  /** Keeps the tap's queue filled with frames of `size` bytes while `use` runs. */
  async whileFlooded<Result>(size: number, use: () => Promise<Result>): Promise<Result> {
    const [program, ...args] = this.prefix;
    const command = [...args, compileReference('flood.c'), TAP, `${size}`];
    const flood = spawn(program, command, { stdio: ['ignore', 'ignore', 'inherit'] });
    const ended = once(flood, 'close');
    try {
      return await use();
    } finally {
      flood.kill();
      await ended;
    }
  }

  [Symbol.dispose](): void {
    this.#holder.stdin?.end();
  }
}
