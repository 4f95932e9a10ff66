import { TsvisorError } from '../errors.js';

/** What has been copied so far. */
export interface CopySummary {
  /** Of files' contents. */
  readonly bytes: number;
  readonly files: number;
  readonly directories: number;
  readonly symlinks: number;
  /** Devices, sockets and FIFOs, which are left out. */
  readonly skipped: number;
}

/** Limits of a copy, and who is told of its progress. */
export interface CopyOptions {
  readonly signal?: AbortSignal;
  /** Called after each entry and piece of a file; `path` is within the tree, without a leading slash, '' for its root. */
  readonly onProgress?: (progress: CopySummary & { readonly path: string }) => void;
  /** More than so many bytes of contents fail with ERR_GUEST_FILE (EFBIG). Default no limit. */
  readonly maxBytes?: number;
  /** The same for the number of files, directories and links (default 1000000): each takes an inode. */
  readonly maxEntries?: number;
}

const DEFAULT_MAX_ENTRIES = 1_000_000;

/** Counts what is copied, reports it and keeps its limits. */
export class CopyTally {
  readonly #options: CopyOptions;
  readonly #counts = { bytes: 0, files: 0, directories: 0, symlinks: 0, skipped: 0 };
  #entries = 0;

  constructor(options: CopyOptions) {
    this.#options = options;
  }

  get summary(): CopySummary {
    return { ...this.#counts };
  }

  entry(kind: 'files' | 'directories' | 'symlinks' | 'skipped', path: Buffer): void {
    this.#counts[kind]++;
    this.#entries++;
    const { maxEntries = DEFAULT_MAX_ENTRIES } = this.#options;
    if (this.#entries > maxEntries) throw tooMuch(`more than ${maxEntries} files`, 'maxEntries');
    this.#report(path);
  }

  data(size: number, path: Buffer): void {
    this.#counts.bytes += size;
    const { maxBytes = Number.POSITIVE_INFINITY } = this.#options;
    if (this.#counts.bytes > maxBytes) throw tooMuch(`more than ${maxBytes} bytes`, 'maxBytes');
    this.#report(path);
  }

  #report(path: Buffer): void {
    this.#options.onProgress?.({ ...this.#counts, path: path.toString() });
  }
}

function tooMuch(what: string, option: string): TsvisorError {
  return new TsvisorError('ERR_GUEST_FILE', `the tree to copy has ${what}; raise ${option} if that is right`);
}

const SLASH = Buffer.from('/');

/** Joins paths that need not be UTF-8; an empty one adds nothing. */
export function join(folder: Buffer, name: Buffer): Buffer {
  if (folder.length === 0 || name.length === 0) return folder.length === 0 ? name : folder;
  return Buffer.concat([folder, SLASH, name]);
}
