import { Readable } from 'node:stream';
import { ByteQueue } from '../backends/byte-queue.js';
import { GuestError, UsageError } from '../errors.js';
import { type Channel, type Connection, request } from './connection.js';
import type { CopyOptions, CopySummary } from './copy.js';
import { copyIn } from './copy-in.js';
import { copyOut } from './copy-out.js';
import { type FileEntry, readEntry } from './file-entry.js';
import { frameError } from './guest-error.js';
import {
  encodeFrame,
  FrameType,
  FrameWriter,
  MAX_DATA,
  MkdirFlag,
  RemoveFlag,
  StatFlag,
  violation,
  WriteFlag,
} from './protocol.js';
import { checkSource } from './source.js';
import { expectOk, upload } from './upload.js';

/** What every operation on files takes. */
export interface Abortable {
  /** Ends the operation when it is aborted, which then rejects with its reason. */
  readonly signal?: AbortSignal;
}

const DEFAULT_MAX_BYTES = 64 * 1024 * 1024;
/** Entries of a folder: a guest must not fill the host's memory with them. */
const MAX_LISTED = 1_000_000;
const MAX_LISTED_BYTES = 128 * 1024 * 1024;

/**
 * The guest's files, as its root. Paths are the guest's; relative ones start at /. What the guest refuses rejects with
 * GuestError ERR_GUEST_FILE, whose `errno` says why.
 */
export class GuestFileSystem {
  readonly #channel: Channel;

  /** For Agent. */
  constructor(channel: Channel) {
    this.#channel = channel;
  }

  /** The contents of a file; more than `maxBytes` (default 64 MiB) reject with EFBIG. */
  readFile(path: string, options: 'utf8' | (Abortable & { encoding: 'utf8'; maxBytes?: number })): Promise<string>;
  readFile(path: string, options?: Abortable & { maxBytes?: number }): Promise<Buffer>;
  async readFile(
    path: string,
    options: 'utf8' | (Abortable & { encoding?: 'utf8'; maxBytes?: number }) = {},
  ): Promise<string | Buffer> {
    const {
      signal,
      encoding,
      maxBytes = DEFAULT_MAX_BYTES,
    } = typeof options === 'string' ? { signal: undefined, encoding: options } : options;
    if (encoding !== undefined && encoding !== 'utf8') throw new UsageError(`encoding: ${encoding} is not utf8`);
    const bytes = new ByteQueue(); // the guest chooses how small its pieces are
    for await (const chunk of this.#read(path, signal)) {
      bytes.push(chunk);
      if (bytes.length > maxBytes) {
        throw new GuestError('ERR_GUEST_FILE', 'EFBIG', `${path} (in the guest): has more than ${maxBytes} bytes`);
      }
    }
    const contents = bytes.toBuffer();
    return encoding ? contents.toString(encoding) : contents;
  }

  /** The contents of a file, of any size. */
  createReadStream(path: string, { signal }: Abortable = {}): Readable {
    return Readable.from(this.#read(path, signal), { objectMode: false });
  }

  /**
   * Writes a file whole: it is there with all of it, or as it was before. A symbolic link's file is written. Devices and
   * files in /proc and /sys are written in place. `mode` is its permissions; default those of the file that is replaced, or
   * 0o644.
   */
  async writeFile(
    path: string,
    data: string | Uint8Array | AsyncIterable<Uint8Array>,
    { signal, mode }: Abortable & { mode?: number } = {},
  ): Promise<void> {
    checkMode(mode);
    checkSource(data, 'data');
    const flags = mode === undefined ? 0 : WriteFlag.hasMode;
    const frame = new FrameWriter(FrameType.write)
      .u32(flags)
      .u32(mode ?? 0)
      .path(path)
      .frame();
    using connection = await this.#request(frame, signal);
    await expectOk(connection);
    await upload(connection, dataFrames(data));
  }

  /** What is in a folder, without `.` and `..`, in no order. Links are not followed. */
  async list(path: string, { signal }: Abortable = {}): Promise<FileEntry[]> {
    const frame = new FrameWriter(FrameType.list).path(path).frame();
    using connection = await this.#request(frame, signal);
    const entries: FileEntry[] = [];
    let size = 0;
    for (;;) {
      const frame = await connection.expect();
      if (frame.type === FrameType.end) return entries;
      if (frame.type !== FrameType.entry) throw frameError('ERR_GUEST_FILE', frame);
      size += frame.payload.length;
      if (entries.length === MAX_LISTED || size > MAX_LISTED_BYTES) {
        throw violation(`more than ${MAX_LISTED} entries or ${MAX_LISTED_BYTES} bytes of them in a folder`);
      }
      entries.push(readEntry(frame.payload));
    }
  }

  /** What a file is, or with `followSymlinks` (default true) what a symbolic link leads to. */
  async stat(
    path: string,
    { signal, followSymlinks = true }: Abortable & { followSymlinks?: boolean } = {},
  ): Promise<FileEntry> {
    const flags = followSymlinks ? 0 : StatFlag.noFollow;
    const frame = new FrameWriter(FrameType.stat).u32(flags).path(path).frame();
    using connection = await this.#request(frame, signal);
    const answer = await connection.expect();
    if (answer.type !== FrameType.entry) throw frameError('ERR_GUEST_FILE', answer);
    return { ...readEntry(answer.payload), name: path.split('/').at(-1) ?? path };
  }

  /** Makes a folder; with `recursive`, also those it is in, and one that is there is no error. `mode` is 0o755 by default. */
  async mkdir(
    path: string,
    { signal, recursive = false, mode = 0o755 }: Abortable & { recursive?: boolean; mode?: number } = {},
  ): Promise<void> {
    checkMode(mode);
    const flags = recursive ? MkdirFlag.parents : 0;
    await this.#ask(new FrameWriter(FrameType.mkdir).u32(flags).u32(mode).path(path), signal);
  }

  /**
   * Removes a file, a link or an empty folder; with `recursive`, a folder with all that is in it. With `force`, a missing
   * file is no error.
   */
  async remove(
    path: string,
    { signal, recursive = false, force = false }: Abortable & { recursive?: boolean; force?: boolean } = {},
  ): Promise<void> {
    const flags = (recursive ? RemoveFlag.recursive : 0) | (force ? RemoveFlag.force : 0);
    await this.#ask(new FrameWriter(FrameType.remove).u32(flags).path(path), signal);
  }

  /**
   * Copies a file or folder of the host into the guest, as `guestPath` itself, whose missing parents are made. Modes, times
   * and symbolic links are kept, a link at `hostPath` itself is followed, owners are root; devices, sockets and FIFOs are left
   * out. What is there is merged with, file by file.
   */
  async copyIn(hostPath: string, guestPath: string, options: CopyOptions = {}): Promise<CopySummary> {
    const frame = new FrameWriter(FrameType.unpack).path(guestPath, 'guestPath').frame();
    using connection = await this.#request(frame, options.signal);
    await expectOk(connection);
    return await copyIn(connection, hostPath, options);
  }

  /**
   * Copies a file or folder of the guest to the host, as copyIn does the other way. Nothing outside `hostPath` is written, no
   * link there is followed, and setuid and setgid bits are not kept, whatever the guest sends.
   */
  async copyOut(guestPath: string, hostPath: string, options: CopyOptions = {}): Promise<CopySummary> {
    const frame = new FrameWriter(FrameType.pack).path(guestPath, 'guestPath').frame();
    using connection = await this.#request(frame, options.signal);
    return await copyOut(connection, hostPath, options);
  }

  #request(frame: Buffer, signal: AbortSignal | undefined): Promise<Connection> {
    return request(this.#channel, frame, signal);
  }

  async #ask(request: FrameWriter, signal: AbortSignal | undefined): Promise<void> {
    using connection = await this.#request(request.frame(), signal);
    await expectOk(connection);
  }

  /** The operation lasts for as long as the generator is used. */
  async *#read(path: string, signal: AbortSignal | undefined): AsyncGenerator<Buffer> {
    const frame = new FrameWriter(FrameType.read).path(path).frame();
    using connection = await this.#request(frame, signal);
    for (;;) {
      const frame = await connection.expect();
      if (frame.type === FrameType.end) return;
      if (frame.type !== FrameType.data) throw frameError('ERR_GUEST_FILE', frame);
      if (frame.payload.length === 0) throw violation('a piece of a file with nothing in it');
      yield frame.payload;
    }
  }
}

function checkMode(mode: number | undefined): void {
  if (mode !== undefined && !(Number.isInteger(mode) && mode >= 0 && mode <= 0o7777)) {
    throw new UsageError(`mode: ${mode} is not a number from 0 to 0o7777`);
  }
}

async function* dataFrames(data: string | Uint8Array | AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
  const source = typeof data === 'string' ? [Buffer.from(data)] : data instanceof Uint8Array ? [data] : data;
  for await (const chunk of source) {
    const bytes = typeof chunk === 'string' ? Buffer.from(chunk) : chunk;
    for (let at = 0; at < bytes.length; at += MAX_DATA) {
      yield encodeFrame(FrameType.data, bytes.subarray(at, at + MAX_DATA));
    }
  }
  yield encodeFrame(FrameType.end);
}
