// Page sources of test/kvm/page-source.test.ts: they read a memory file, and fail as they are told.
import { open } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';

/** options: the file, milliseconds that each answer takes, after how many reads or at which offset what goes wrong. */
export default class FilePages {
  #reads = 0;
  #options;
  #file;

  constructor(options) {
    this.#options = options;
    this.#file = open(options.file);
  }

  async read(offset, into) {
    const { ms = 0, fail, after = 0, at } = this.#options;
    if (ms > 0) await delay(ms);
    if (fail && this.#reads++ >= after && (at === undefined || at === offset)) return failures[fail](into);
    const file = await this.#file;
    return (await file.read(into, 0, into.length, offset)).bytesRead;
  }

  async close() {
    await (await this.#file).close();
  }
}

const failures = {
  rejects: () => Promise.reject(new Error('the disk\nis gone')),
  throws: () => {
    throw 'the disk is gone';
  },
  short: () => 100,
  nothing: () => {},
  never: () => new Promise(() => {}),
  spins: () => {
    for (;;);
  },
  exits: () => process.exit(3),
  uncaught: () =>
    new Promise(() => {
      setTimeout(() => {
        throw new Error('on its own');
      });
    }),
};

/** A function that makes one. */
export async function make(options) {
  await delay(10);
  return new FilePages(options);
}

export const arrow = (options) => new FilePages(options);

export class NoReader {}

export class Throws {
  constructor() {
    throw new Error('no such server');
  }
}

export const notOne = 5;

export const exits = () => process.exit(1);

/** Does not end by itself, nor let its thread end. */
export class Clings extends FilePages {
  close() {
    return new Promise((resolve) => setTimeout(resolve, 1e9));
  }
}
