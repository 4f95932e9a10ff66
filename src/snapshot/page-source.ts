import { Worker } from 'node:worker_threads';
import { errnoName, SnapshotError, UsageError } from '../errors.js';
import { addon } from '../kvm/addon.js';
import { moduleUrl } from '../machine/device-config.js';
import { checkFields, type FieldsOf } from '../machine/fields.js';
import type { PageSourceLink } from '../machine/page-faults.js';

/**
 * Gives the memory of a restored machine from anywhere, as it is touched: what the module of `pages` exports makes one.
 * It lives on a thread of its own. Until it answers, whoever touched that memory waits, be it the guest's CPU.
 */
export interface PageSource {
  /**
   * Fills in a piece of guest RAM. Several may be asked for at a time, up to 16, each piece once.
   * @param offset of it in the RAM, as in the `memory` file of a snapshot: a multiple of 65536 bytes.
   * @param into 65536 bytes, fewer only at the end of RAM; zeros at first. It is yours until you return.
   * @returns how many bytes were filled in, which must be all: fewer, as an error thrown, is the end of the machine.
   */
  read(offset: number, into: Uint8Array): Promise<number> | number;
  /** Nothing more is asked for: all of the memory is there, or the machine has ended. */
  close?(): Promise<void> | void;
}

/** Who gives a restored machine its memory. */
export interface PageSourceConfig {
  /** Path of a module, from the current directory, or its file: URL, as `new URL('./pages.js', import.meta.url)`. */
  readonly module: string | URL;
  /**
   * Name of the module's export that makes a PageSource: a class, or a function that returns one or a promise of one.
   * Default `default`.
   */
  readonly export?: string;
  /** What it is given: anything that can be cloned to another thread. */
  readonly options?: unknown;
  /** Milliseconds in which each read() has to answer, 1 to 2^31 - 1; default 30000. The machine ends when it has not. */
  readonly timeout?: number;
}

/** What the source's thread is given. */
export interface PageSourceThreadData {
  /** Its end of the socket, which it closes. */
  readonly channel: number;
  /** Bytes of RAM. */
  readonly size: number;
  readonly module: string;
  readonly exportName: string;
  readonly options: unknown;
}

/** What it says: that it is ready, or why not. */
export type PageSourceMessage = { readonly error: string | undefined };

const FIELDS: FieldsOf<PageSourceConfig> = { module: true, export: true, options: true, timeout: true };
const DEFAULT_TIMEOUT = 30_000;
/** Milliseconds in which a source has to be made. */
const START_TIME = 30_000;
/** Milliseconds that it has for its close(). */
const CLOSE_TIME = 1000;
const EPERM = 1;
const EACCES = 13;

/** The main thread's side of a page source: its thread, and the descriptors between that and the machine's. */
export class PageSourceThread {
  readonly link: PageSourceLink;
  readonly #descriptors: number[] = [];
  #worker: Worker | undefined;
  #exited: Promise<void> = Promise.resolve();

  private constructor({ timeout = DEFAULT_TIMEOUT }: PageSourceConfig, prefetch: boolean) {
    const uffd = this.#own(addon.userfaultfd(), (errno) =>
      errno === EPERM || errno === EACCES
        ? 'this user may not have page faults of guests; run: sudo sysctl vm.unprivileged_userfaultfd=1, or give the ' +
          'user access to /dev/userfaultfd'
        : `this host gives no page faults (userfaultfd: ${errnoName(errno)})`,
    );
    const stop = this.#own(addon.eventfd(0), (errno) => `eventfd: ${errnoName(errno)}`);
    const socketFailed = (errno: number) => `socketpair: ${errnoName(errno)}`;
    const pair = addon.socketpair();
    const [channel, there] = typeof pair === 'number' ? [pair, pair] : pair;
    this.link = { uffd, stop, channel: this.#own(channel, socketFailed), timeout, prefetch };
    this.#own(there, socketFailed); // the last: see #start()
  }

  /**
   * Starts a source and waits until it is there. @param size bytes of RAM.
   * @throws UsageError; SnapshotError when the module, or this host, is not fit for it.
   */
  static async open(config: PageSourceConfig, size: number, prefetch: boolean): Promise<PageSourceThread> {
    const { url, exportName, options } = checkPages(config);
    const source = new PageSourceThread(config, prefetch);
    try {
      await source.#start({ size, module: url.href, exportName, options });
      return source;
    } catch (error) {
      await source.close();
      throw error;
    }
  }

  async #start(data: Omit<PageSourceThreadData, 'channel'>): Promise<void> {
    const there = this.#descriptors.pop() as number;
    addon.release(there); // the thread closes it
    const worker = new Worker(new URL('../snapshot/page-source-thread.js', import.meta.url), {
      name: 'tsvisor-pages',
      workerData: { ...data, channel: there } satisfies PageSourceThreadData,
      execArgv: [],
    });
    this.#worker = worker;
    await new Promise<void>((resolve, reject) => {
      const fail = (why: string) => reject(new SnapshotError(`snapshot: pages: ${data.module}: ${why}`));
      worker.once('message', ({ error }: PageSourceMessage) => {
        clearTimeout(late);
        if (error === undefined) resolve();
        else fail(error);
      });
      worker.on('error', (error) => fail(error.message));
      const late = setTimeout(() => fail(`it was not ready within ${START_TIME} ms`), START_TIME);
      this.#exited = new Promise((exited) => {
        worker.once('exit', () => {
          clearTimeout(late);
          fail('its thread ended');
          exited();
        });
      });
    });
    worker.unref(); // the machine keeps the process
  }

  /** The descriptors of `link`, which the caller closes from now on, when the machine's thread is gone. */
  handOver(): number[] {
    return this.#descriptors.splice(0);
  }

  /** Ends the thread, which hears from the channel that nobody asks any more. */
  async close(): Promise<void> {
    for (const fd of this.#descriptors.splice(0)) addon.close(fd);
    const worker = this.#worker;
    worker?.ref();
    const late = setTimeout(() => void worker?.terminate(), CLOSE_TIME);
    await this.#exited;
    clearTimeout(late);
  }

  #own(fd: number, why: (errno: number) => string): number {
    if (fd >= 0) {
      this.#descriptors.push(fd);
      return fd;
    }
    for (const other of this.#descriptors.splice(0)) addon.close(other);
    throw new SnapshotError(`snapshot: pages: ${why(-fd)}`);
  }
}

/** @throws UsageError that names the field. */
function checkPages(config: PageSourceConfig) {
  checkFields(config, 'pages', FIELDS);
  const { module, export: exportName = 'default', options, timeout = DEFAULT_TIMEOUT } = config;
  const url = moduleUrl(module);
  if (!url) throw new UsageError(`pages.module: '${module}' is neither a path nor a file: URL`);
  if (typeof exportName !== 'string' || exportName === '') throw new UsageError('pages.export: must be a name');
  if (!(Number.isInteger(timeout) && timeout >= 1 && timeout < 2 ** 31)) {
    throw new UsageError(`pages.timeout: ${timeout} is not 1 to 2^31 - 1 ms`);
  }
  try {
    return { url, exportName, options: structuredClone(options) };
  } catch (error) {
    throw new UsageError(`pages.options: ${(error as Error).message.replaceAll(/\s+/g, ' ')}`, { cause: error });
  }
}
