// @ts-check
import { createHash } from 'node:crypto';
import { constants } from 'node:os';
import { NinePError, Reader, Writer } from './messages.js';

/**
 * A file system: an object is a directory, text or bytes are a file, and so is a function, whose (promised) result is
 * what the file holds at that moment. Files that the guest writes become Buffers.
 * @typedef {{ [name: string]: Tree | Content | (() => Content | Promise<Content>) }} Tree
 * @typedef {string | Uint8Array} Content
 */

const { ENOENT, EEXIST, ENOTDIR, EISDIR, EINVAL, EIO, ENOSPC, ENOTEMPTY, EACCES, EBADF, EMFILE, ENOMEM, EOPNOTSUPP } =
  constants.errno;
const RLERROR = 7;
const MAX_MESSAGE = 64 * 1024;
const MAX_FIDS = 4096;
const MAX_DEPTH = 64;
const MAX_NAMES = 16;
/** Bytes of a reply of data before the data. */
const DATA_HEADER = 11;
const [S_IFDIR, S_IFREG] = [0o040000, 0o100000];
const O_TRUNC = 0o1000;
const SETATTR_SIZE = 8;
const AT_REMOVEDIR = 0x200;
/** What an empty file or directory counts for in the quota. */
const ENTRY_BYTES = 256;

/** @typedef {{ path: string[], content?: Buffer }} Fid `content`: what a function gave when it was opened. */

/** @param {unknown} node @returns {node is Tree} */
function isDirectory(node) {
  return typeof node === 'object' && node !== null && !(node instanceof Uint8Array);
}

/** @param {unknown} node @returns {Promise<Buffer>} */
async function contentOf(node) {
  const content = typeof node === 'function' ? await node() : node;
  return Buffer.from(/** @type {any} */ (content));
}

/** A 9P2000.L server for an object. It allows a guest no more memory than its quota, and nothing outside the object. */
class ObjectServer {
  #root;
  #left;
  /** @type {Map<number, Fid>} */
  #fids = new Map();
  /** Requests that are under way, by tag. @type {Map<number, Promise<unknown>>} */
  #open = new Map();
  #messageSize = MAX_MESSAGE;

  /** @param {Tree} root @param {number} quota */
  constructor(root, quota) {
    this.#root = root;
    this.#left = quota;
  }

  /**
   * Answers one request. @param {Uint8Array} request @param {number} room bytes that the reply may have
   * @returns {Promise<Uint8Array>}
   */
  async answer(request, room) {
    const reader = new Reader(request);
    let tag = 0xffff;
    try {
      reader.u32();
      const type = reader.u8();
      tag = reader.u16();
      const operation = operations[type];
      const answered = (operation?.call(this, reader, room) ?? Promise.reject(new NinePError(EOPNOTSUPP))).then(
        (/** @type {Writer} */ reply) => reply.message(type + 1, tag),
      );
      this.#open.set(tag, answered);
      return await answered;
    } catch (error) {
      return new Writer().u32(error instanceof NinePError ? error.code : EIO).message(RLERROR, tag);
    } finally {
      this.#open.delete(tag);
    }
  }

  /** @param {Reader} reader */
  async version(reader) {
    this.#messageSize = Math.max(4096, Math.min(reader.u32(), MAX_MESSAGE));
    const known = reader.text() === '9P2000.L';
    for (const number of this.#fids.keys()) this.#drop(number);
    return new Writer().u32(this.#messageSize).text(known ? '9P2000.L' : 'unknown');
  }

  /** @param {Reader} reader */
  async attach(reader) {
    this.#setFid(reader.u32(), { path: [] });
    return this.#qid(new Writer(), []);
  }

  /** An answer to this says that the old request will not be answered any more. @param {Reader} reader */
  async flush(reader) {
    await this.#open.get(reader.u16())?.catch(() => {});
    return new Writer();
  }

  /** @param {Reader} reader */
  async walk(reader) {
    const from = this.#fid(reader.u32());
    const newFid = reader.u32();
    const count = reader.u16();
    if (count > MAX_NAMES) throw new NinePError(EINVAL);
    const names = Array.from({ length: count }, () => reader.text());
    const qids = new Writer();
    let path = from.path;
    let found = 0;
    for (const name of names) {
      const next = name === '..' ? path.slice(0, -1) : [...path, name];
      if (this.#find(next) === undefined || next.length > MAX_DEPTH) break;
      this.#qid(qids, next);
      path = next;
      found++;
    }
    if (found < names.length && found === 0) throw new NinePError(ENOENT);
    if (found === names.length) this.#setFid(newFid, { path });
    return new Writer().u16(found).bytes(qids.message(0, 0).subarray(7));
  }

  /** @param {Reader} reader */
  async getattr(reader) {
    const { path, content } = this.#fid(reader.u32());
    const node = this.#node(path);
    const directory = isDirectory(node);
    // One that fails now may not when it is opened.
    const size = directory ? 0 : (content ?? (await contentOf(node).catch(() => []))).length;
    const mode = directory ? S_IFDIR | 0o755 : S_IFREG | (typeof node === 'function' ? 0o444 : 0o644);
    const reply = this.#qid(new Writer().u64(0x7ff), path).u32(mode).u32(0).u32(0);
    for (const value of [directory ? 2 : 1, 0, size, 4096, Math.ceil(size / 512)]) reply.u64(value);
    for (let i = 0; i < 10; i++) reply.u64(0); // times, generation, data version
    return reply;
  }

  /** @param {Reader} reader */
  async setattr(reader) {
    const { path } = this.#fid(reader.u32());
    const valid = reader.u32();
    reader.bytes(12);
    const size = reader.u64();
    if (valid & SETATTR_SIZE) this.#resize(path, size);
    return new Writer();
  }

  /** @param {Reader} reader */
  async statfs(reader) {
    this.#fid(reader.u32());
    const blocks = Math.floor(this.#left / 4096);
    const reply = new Writer().u32(0x01021997).u32(4096);
    for (const value of [blocks, blocks, blocks, 0, 0, 0]) reply.u64(value);
    return reply.u32(255);
  }

  /** @param {Reader} reader */
  async open(reader) {
    const number = reader.u32();
    const { path } = this.#fid(number);
    const flags = reader.u32();
    const node = this.#node(path);
    if (typeof node === 'function') {
      if (flags & 3) throw new NinePError(EACCES);
      const content = await contentOf(node);
      this.#setFid(number, { path });
      if (content.length > this.#left) throw new NinePError(ENOMEM);
      this.#left -= content.length;
      this.#setFid(number, { path, content });
    } else if (flags & O_TRUNC) this.#resize(path, 0);
    return this.#qid(new Writer(), path).u32(0);
  }

  /** @param {Reader} reader */
  async create(reader) {
    const number = reader.u32();
    const path = this.#add(this.#fid(number).path, reader.text(), () => Buffer.alloc(0));
    this.#setFid(number, { path });
    return this.#qid(new Writer(), path).u32(0);
  }

  /** @param {Reader} reader */
  async mkdir(reader) {
    const path = this.#add(this.#fid(reader.u32()).path, reader.text(), () => ({}));
    return this.#qid(new Writer(), path);
  }

  /** @param {Reader} reader @param {number} room */
  async read(reader, room) {
    const { path, content } = this.#fid(reader.u32());
    const offset = reader.u64();
    const count = Math.min(reader.u32(), this.#messageSize - DATA_HEADER, room - DATA_HEADER);
    const node = this.#node(path);
    if (isDirectory(node)) throw new NinePError(EISDIR);
    const data = (content ?? (await contentOf(node))).subarray(offset, offset + count);
    return new Writer().u32(data.length).bytes(data);
  }

  /** @param {Reader} reader */
  async write(reader) {
    const { path } = this.#fid(reader.u32());
    const offset = reader.u64();
    const data = reader.bytes(reader.u32());
    const file = this.#writable(path);
    const bytes = offset + data.length > file.length ? this.#resize(path, offset + data.length) : file;
    bytes.set(data, offset);
    return new Writer().u32(data.length);
  }

  /** @param {Reader} reader @param {number} room */
  async readdir(reader, room) {
    const { path } = this.#fid(reader.u32());
    const offset = reader.u64();
    const count = Math.min(reader.u32(), this.#messageSize - DATA_HEADER, room - DATA_HEADER);
    const node = this.#node(path);
    if (!isDirectory(node)) throw new NinePError(ENOTDIR);
    const entries = new Writer();
    for (const [index, name] of ['.', '..', ...Object.keys(node)].entries()) {
      const at = index < 2 ? path : [...path, name];
      const entry = this.#qid(new Writer(), at)
        .u64(index + 1)
        .u8(index < 2 || isDirectory(this.#find(at)) ? 4 : 8) // DT_DIR, DT_REG
        .text(name);
      if (index < offset) continue;
      if (entries.length + entry.length > count) break;
      entries.bytes(entry.message(0, 0).subarray(7));
    }
    return new Writer().u32(entries.length).bytes(entries.message(0, 0).subarray(7));
  }

  /** @param {Reader} reader */
  async clunk(reader) {
    this.#drop(reader.u32());
    return new Writer();
  }

  /** @param {Reader} reader */
  async unlink(reader) {
    const path = [...this.#fid(reader.u32()).path, reader.text()];
    const directory = (reader.u32() & AT_REMOVEDIR) !== 0;
    const node = this.#node(path);
    if (directory !== isDirectory(node)) throw new NinePError(directory ? ENOTDIR : EISDIR);
    if (isDirectory(node) && Object.keys(node).length > 0) throw new NinePError(ENOTEMPTY);
    if (node instanceof Buffer) this.#left += node.length;
    delete this.#directory(path.slice(0, -1))[/** @type {string} */ (path.at(-1))];
    return new Writer();
  }

  /** Nothing is kept elsewhere. */
  async fsync() {
    return new Writer();
  }

  /** @param {number} number */
  #fid(number) {
    const fid = this.#fids.get(number);
    if (!fid) throw new NinePError(EBADF);
    return fid;
  }

  /** @param {number} number @param {Fid} fid */
  #setFid(number, fid) {
    this.#drop(number);
    if (this.#fids.size >= MAX_FIDS) throw new NinePError(EMFILE);
    this.#fids.set(number, fid);
  }

  /** @param {number} number */
  #drop(number) {
    this.#left += this.#fids.get(number)?.content?.length ?? 0;
    this.#fids.delete(number);
  }

  /** What is at a path; undefined if nothing is. @param {string[]} path @returns {Tree[string] | undefined} */
  #find(path) {
    /** @type {Tree[string] | undefined} */
    let node = this.#root;
    for (const name of path) node = isDirectory(node) && Object.hasOwn(node, name) ? node[name] : undefined;
    return node;
  }

  /** @param {string[]} path */
  #node(path) {
    const node = this.#find(path);
    if (node === undefined) throw new NinePError(ENOENT);
    return node;
  }

  /** @param {string[]} path */
  #directory(path) {
    const node = this.#node(path);
    if (!isDirectory(node)) throw new NinePError(ENOTDIR);
    return node;
  }

  /** Adds an entry. @param {string[]} at @param {string} name @param {() => Buffer | Tree} make */
  #add(at, name, make) {
    const path = [...at, name];
    if (name === '' || name === '.' || name === '..' || name.includes('/')) throw new NinePError(EINVAL);
    if (path.length > MAX_DEPTH || this.#left < ENTRY_BYTES) throw new NinePError(ENOSPC);
    if (this.#find(path) !== undefined) throw new NinePError(EEXIST);
    this.#set(path, make());
    this.#left -= ENTRY_BYTES;
    return path;
  }

  /** Not by assignment: `__proto__` is a name like others. @param {string[]} path @param {Buffer | Tree} value */
  #set(path, value) {
    const name = /** @type {string} */ (path.at(-1));
    const how = { value, writable: true, enumerable: true, configurable: true };
    Object.defineProperty(this.#directory(path.slice(0, -1)), name, how);
  }

  /** A file as a Buffer of the object. @param {string[]} path @returns {Buffer} */
  #writable(path) {
    const node = this.#node(path);
    if (isDirectory(node)) throw new NinePError(EISDIR);
    if (typeof node === 'function') throw new NinePError(EACCES);
    return Buffer.isBuffer(node) ? node : this.#resize(path, Buffer.from(node).length);
  }

  /** @param {string[]} path @param {number} size @returns {Buffer} */
  #resize(path, size) {
    const node = this.#node(path);
    if (isDirectory(node)) throw new NinePError(EISDIR);
    if (typeof node === 'function') throw new NinePError(EACCES);
    const old = Buffer.from(node);
    const grown = size - (Buffer.isBuffer(node) ? old.length : 0);
    if (grown > this.#left) throw new NinePError(ENOSPC);
    this.#left -= grown;
    const file = Buffer.alloc(size);
    old.copy(file);
    this.#set(path, file);
    return file;
  }

  /** Type, version and a number of its own for each path. @param {Writer} writer @param {string[]} path */
  #qid(writer, path) {
    const number = createHash('sha1').update(path.join('/')).digest().readBigUInt64LE();
    return writer
      .u8(isDirectory(this.#find(path)) ? 0x80 : 0)
      .u32(0)
      .u64(number);
  }
}

const server = ObjectServer.prototype;
/** By the type of the request. @type {Record<number, (reader: Reader, room: number) => Promise<Writer>>} */
const operations = {
  8: server.statfs,
  12: server.open,
  14: server.create,
  24: server.getattr,
  26: server.setattr,
  40: server.readdir,
  50: server.fsync,
  72: server.mkdir,
  76: server.unlink,
  100: server.version,
  104: server.attach,
  108: server.flush,
  110: server.walk,
  116: server.read,
  118: server.write,
  120: server.clunk,
};

/**
 * Answers the requests of a NineP device (device.js) from an object.
 * @param {import('tsvisor').DeviceHandle} device
 * @param {Tree} root
 * @param {{ quota?: number }} [options] `quota`: bytes that the guest's writes may add, default 16 MiB
 */
export function serveObject(device, root, { quota = 16 * 2 ** 20 } = {}) {
  const server = new ObjectServer(root, quota);
  device.on('message', async (/** @type {any} */ { id, request, room }) => {
    device.postMessage({ id, reply: await server.answer(request, room) });
  });
}
