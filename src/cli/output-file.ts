import {
  closeSync,
  fsyncSync,
  lstatSync,
  openSync,
  realpathSync,
  renameSync,
  statSync,
  unlinkSync,
  writeSync,
} from 'node:fs';
import { dirname, resolve } from 'node:path';
import { TsvisorError } from '../errors.js';

/**
 * A file that appears complete or not at all: opened (and its errors reported) at once, filled and renamed later. Links are
 * followed. What is not a regular file is written in place, and so is what /dev/stderr and the like lead to, even if that
 * is one: the content is added at its end.
 */
export class OutputFile {
  readonly #path: string;
  readonly #temporary: string | undefined;
  #fd: number;

  /** @param option for the error message. @throws TsvisorError ERR_OUTPUT. */
  constructor(option: string, path: string) {
    const named = resolve(path);
    const existing = statSync(named, { throwIfNoEntry: false });
    const isLink = existing !== undefined && lstatSync(named).isSymbolicLink();
    const isOpenFile = isLink && /^\/(dev|proc)\//.test(named);
    const inPlace = isOpenFile || (existing !== undefined && !existing.isFile() && !existing.isDirectory());
    this.#path = isLink && !inPlace ? realpathSync(named) : named;
    this.#temporary = inPlace ? undefined : `${this.#path}.${process.pid}.tmp`;
    try {
      if (existing?.isDirectory()) throw new Error('it is a directory');
      this.#fd = openSync(this.#temporary ?? this.#path, inPlace ? 'a' : 'w');
    } catch (error) {
      const reason = describe(error, path);
      throw new TsvisorError('ERR_OUTPUT', `--${option}: cannot write ${path}: ${reason}`, { cause: error });
    }
  }

  /** Writes the content and lets the file appear. @throws TsvisorError ERR_OUTPUT. */
  commit(content: string): void {
    try {
      writeSync(this.#fd, content);
      if (this.#temporary) fsyncSync(this.#fd);
      this.#close();
      if (this.#temporary) renameSync(this.#temporary, this.#path);
    } catch (error) {
      this.discard();
      throw new TsvisorError('ERR_OUTPUT', `cannot write ${this.#path}: ${describe(error, this.#path)}`, {
        cause: error,
      });
    }
  }

  /** Leaves nothing behind. */
  discard(): void {
    if (this.#fd < 0) return;
    this.#close();
    if (this.#temporary) unlinkSync(this.#temporary);
  }

  #close(): void {
    if (this.#fd >= 0) closeSync(this.#fd);
    this.#fd = -1;
  }
}

/** The reason of a failed open as a person would say it. */
function describe(error: unknown, path: string): string {
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === 'ENOENT') return `there is no folder ${dirname(path)}`;
  if (code === 'EACCES' || code === 'EPERM') return 'permission denied';
  if (code === 'EROFS') return 'the file system is read-only';
  if (code === 'ENOSPC') return 'the disk is full';
  return code ?? message;
}
