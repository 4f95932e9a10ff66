import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { UsageError } from '../errors.js';

const MIN_KEY = 16;
/** A key of any use is shorter, and it has to fit a line of the control protocol. */
const MAX_KEY = 4096;

/** Reads a key that nobody else may read. @throws UsageError that names the option and the remedy. */
export function readKey(path: string): Buffer {
  const wrong = (what: string) => new UsageError(`--key ${path}: ${what}`);
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOCTTY);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    const remedy = 'make one: (umask 077; head -c 32 /dev/urandom >FILE), and copy it to the other host';
    throw wrong(code === 'ENOENT' ? `there is no such file; ${remedy}` : (code ?? message));
  }
  try {
    const stat = fstatSync(fd);
    if (!stat.isFile()) throw wrong('it is no regular file');
    if ((stat.mode & 0o077) !== 0) {
      const mode = (stat.mode & 0o777).toString(8).padStart(4, '0');
      throw wrong(`others may read it (its mode is ${mode}): chmod 600 it, and use another key if somebody has`);
    }
    const buffer = Buffer.alloc(MAX_KEY + 1);
    const length = readSync(fd, buffer);
    if (length < MIN_KEY) throw wrong(`it has ${length} bytes, and a key at least ${MIN_KEY}`);
    if (length > MAX_KEY) throw wrong(`it has more than ${MAX_KEY} bytes: it is no key`);
    return buffer.subarray(0, length);
  } finally {
    closeSync(fd);
  }
}
