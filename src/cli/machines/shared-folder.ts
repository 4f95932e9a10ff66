import { closeSync, existsSync, mkdtempSync, openSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { addon } from '../../kvm/addon.js';

/** Tells a process that it shares a folder, and where that is. */
const VARIABLE = 'TSVISOR_SHARED';
const PREFIX = 'tsvisor-shared-';
const LOCK = 'lock';

/**
 * A temporary folder of several processes, which goes with the last of them that ends. Each has a read lock in it, which
 * goes with the process, however that ends; what a killed one left is removed when the next such folder is made.
 */
export class SharedFolder implements Disposable {
  readonly path: string;
  readonly #lock: number;
  #over = false;
  readonly #atExit = () => this[Symbol.dispose]();

  private constructor(path: string, lock: number) {
    this.path = path;
    this.#lock = lock;
    addon.ofdLock(lock, false, false, 0, 0);
    process.once('exit', this.#atExit);
  }

  static make(): SharedFolder {
    for (const name of readdirSync(tmpdir())) if (name.startsWith(PREFIX)) removeIfUnused(join(tmpdir(), name));
    for (;;) {
      const path = mkdtempSync(join(tmpdir(), PREFIX));
      const shared = new SharedFolder(path, openSync(join(path, LOCK), 'wx+', 0o600));
      if (existsSync(join(path, LOCK))) return shared; // nobody took it for one that is left, before it was locked
      shared[Symbol.dispose]();
    }
  }

  /** What another process is started with, so that it shares the folder: it does so before it is ready. */
  get environment(): Record<string, string> {
    return { [VARIABLE]: this.path };
  }

  /** In a process that was started so: shares the folder until it ends. */
  static join(): void {
    const path = process.env[VARIABLE];
    delete process.env[VARIABLE];
    if (path !== undefined) new SharedFolder(path, openSync(join(path, LOCK), 'r+'));
  }

  [Symbol.dispose](): void {
    if (this.#over) return;
    this.#over = true;
    process.removeListener('exit', this.#atExit);
    closeSync(this.#lock);
    removeIfUnused(this.path);
  }
}

/** Of another user's it cannot open the lock; what cannot be removed stays. */
function removeIfUnused(path: string): void {
  try {
    const lock = openSync(join(path, LOCK), 'r+');
    try {
      if (addon.ofdLock(lock, false, true, 0, 0) === 0) rmSync(path, { recursive: true, force: true });
    } finally {
      closeSync(lock);
    }
  } catch {
    // As said above.
  }
}
