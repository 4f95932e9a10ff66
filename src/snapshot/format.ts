import { createHash } from 'node:crypto';
import { isAbsolute } from 'node:path';
import { SnapshotError } from '../errors.js';
import { MAX_EXTENTS } from '../machine/dirty-extents.js';
import { PAGE_SIZE } from '../machine/layout.js';
import type { SavedState } from '../machine/virtual-machine.js';
import { StateReader } from '../state-reader.js';
import { checksumsLength } from './memory-checksums.js';

/**
 * A snapshot is a folder of these files, described in docs/snapshot-format.md:
 *
 *   state           a line `tsvisor-snapshot VERSION SHA256\n`, then the JSON that the checksum is of
 *   memory          guest RAM, every region after the other; of a differential snapshot only its extents, at their places
 *   disk-N.overlay  a copy of drive N's overlay, or
 *   disk-N.raw      of drive N itself
 */
export const STATE_FILE = 'state';
export const MEMORY_FILE = 'memory';

/** Changes with every change of what a state means. */
const VERSION = 1;
const HEADER = /^tsvisor-snapshot (\d{1,9}) ([0-9a-f]{64})\n/;
const HEADER_LIMIT = 128;
/** Bytes of a state: a few dozen KiB, more with many devices of users. */
export const STATE_LIMIT = 64 * 2 ** 20;
const ID = /^[0-9a-f]{32}$/;
const SHA256 = /^[0-9a-f]{64}$/;
const MAX_PATH = 4096;
const MAX_FILES = 64;
/** Arrays and objects in each other, and values in all: more would take stack and memory beyond all proportion. */
const MAX_DEPTH = 32;
const MAX_VALUES = 2 ** 20;
const MAX_MEMORY = 2 ** 40;

/** A file of the host that a snapshot refers to. All of it must be so when it is restored. */
export interface FileReference {
  readonly path: string;
  /** As decimal text: numbers of 64 bits. */
  readonly device: string;
  readonly inode: string;
  readonly size: string;
  readonly modifiedNs: string;
  readonly changedNs: string;
  /** SHA-256 of a sample of its contents, in hexadecimal. */
  readonly contents: string;
}

/** Files that a guest is booted from when it resets itself. */
export interface BootFiles {
  readonly kernel: FileReference;
  readonly initrd?: FileReference;
  readonly agentProgram?: FileReference;
}

/** What a drive becomes when it is restored. */
export type DiskCapture =
  /** Opened where they are: the image, and the overlay if there is one. */
  | { readonly kind: 'reference'; readonly files: readonly FileReference[] }
  /** A private copy is made of the snapshot's copy of the overlay; its base is opened where it is. */
  | { readonly kind: 'overlay'; readonly files: readonly FileReference[] }
  /** The snapshot's copy is the base of a private overlay. */
  | { readonly kind: 'raw'; readonly files: readonly FileReference[] };

/** The content of a state file. */
export interface SnapshotState {
  readonly id: string;
  /** ISO 8601. */
  readonly created: string;
  /** Of the host it was made on: for messages. */
  readonly host: { readonly cpu: string; readonly kernel: string; readonly tsvisor: string };
  /** The machine's configuration without what only a program can give (functions, devices' modules). */
  readonly config: unknown;
  /** Without them the machine ends when the guest resets itself. */
  readonly boot?: BootFiles;
  readonly disks: readonly DiskCapture[];
  readonly memory: {
    /** Bytes of guest RAM, and of the memory file. */
    readonly size: number;
    /**
     * A differential snapshot's other pages are those of this one, by its path from this folder. Its checksum shows that
     * who wrote this one could read that one.
     */
    readonly parent?: { readonly path: string; readonly id: string; readonly checksum: string };
    readonly extents?: readonly (readonly [page: number, count: number])[];
  };
  /** Of the memory file, in base64: see memory-checksums.ts. Only the state of a file has them. */
  readonly memoryChecksums?: string;
  readonly machine: SavedState;
}

/** A state file's bytes. */
export function encodeState(state: SnapshotState): Buffer {
  const body = Buffer.from(JSON.stringify(state));
  return Buffer.concat([Buffer.from(`tsvisor-snapshot ${VERSION} ${sha256(body)}\n`), body]);
}

/** What was read of a state file and checked; `machine` is checked as it is restored. */
export interface CheckedState {
  readonly id: string;
  readonly created: string;
  readonly host: SnapshotState['host'];
  readonly config: unknown;
  readonly boot: BootFiles | undefined;
  readonly disks: readonly DiskCapture[];
  readonly memory: SnapshotState['memory'];
  readonly memoryChecksums: Uint8Array | undefined;
  readonly machine: unknown;
  /** SHA-256 of the state, as its first line has it. */
  readonly checksum: string;
}

/** @param path for messages. @throws SnapshotError unless the bytes are a state of this version, and whole. */
export function decodeState(bytes: Buffer, path: string): CheckedState {
  const header = HEADER.exec(bytes.subarray(0, HEADER_LIMIT).toString('latin1'));
  if (!header) throw new SnapshotError(`${path}: not the state of a snapshot of tsvisor`);
  const [line, version, checksum] = header;
  if (Number(version) !== VERSION) {
    throw new SnapshotError(`${path}: a snapshot of version ${version}; this tsvisor knows version ${VERSION}`);
  }
  const body = bytes.subarray(line.length);
  if (sha256(body) !== checksum) throw new SnapshotError(`${path}: damaged: its checksum is wrong`);
  if (!isModest(body)) throw new SnapshotError(`${path}: damaged: it holds more than a machine can have`);
  let value: unknown;
  try {
    value = JSON.parse(body.toString());
  } catch (cause) {
    throw new SnapshotError(`${path}: damaged: it is no JSON`, { cause });
  }
  const state = new StateReader(value, '');
  const host = state.object('host');
  for (const name of ['config', 'machine']) state.object(name);
  const memory = readMemory(state.object('memory'));
  const sums = 'memoryChecksums';
  return {
    id: hexadecimal(state, 'id', ID),
    created: state.text('created', 64),
    host: { cpu: host.text('cpu', 256), kernel: host.text('kernel', 256), tsvisor: host.text('tsvisor', 64) },
    config: state.raw('config'),
    boot: state.has('boot') ? readBoot(state.object('boot')) : undefined,
    disks: state.list('disks', MAX_FILES).map(readDisk),
    memory,
    memoryChecksums: state.has(sums) ? state.bytes(sums, checksumsLength(memory.size)) : undefined,
    machine: state.raw('machine'),
    checksum: checksum as string,
  };
}

/** Whether JSON is neither too deep nor in too many parts. What is no JSON may be either. */
function isModest(body: Buffer): boolean {
  let depth = 0;
  let values = 1;
  for (let i = 0; i < body.length; i++) {
    switch (body[i]) {
      case 0x22: // "
        for (i++; i < body.length && body[i] !== 0x22; i++) if (body[i] === 0x5c) i++; // \
        break;
      case 0x5b: // [
      case 0x7b: // {
        if (++depth > MAX_DEPTH || ++values > MAX_VALUES) return false;
        break;
      case 0x5d: // ]
      case 0x7d: // }
        depth--;
        break;
      case 0x2c: // ,
        if (++values > MAX_VALUES) return false;
    }
  }
  return true;
}

function hexadecimal(state: StateReader, name: string, pattern: typeof ID): string {
  const text = state.text(name, 64);
  return pattern.test(text) ? text : state.refuse(name, 'is not as many hexadecimal digits as it has');
}

function readBoot(boot: StateReader): BootFiles {
  const [initrd, agentProgram] = ['initrd', 'agentProgram'].map((name) => {
    return boot.has(name) ? readReference(boot.object(name)) : undefined;
  });
  const kernel = readReference(boot.object('kernel'));
  return { kernel, ...(initrd && { initrd }), ...(agentProgram && { agentProgram }) };
}

function readReference(reference: StateReader): FileReference {
  const decimal = (name: string) => {
    const text = reference.text(name, 24);
    return /^-?\d+$/.test(text) ? text : reference.refuse(name, 'is not a decimal number');
  };
  const path = reference.text('path', MAX_PATH);
  if (!isAbsolute(path) || path.includes('\0')) reference.refuse('path', 'is no absolute path');
  return {
    path,
    device: decimal('device'),
    inode: decimal('inode'),
    size: decimal('size'),
    modifiedNs: decimal('modifiedNs'),
    changedNs: decimal('changedNs'),
    contents: hexadecimal(reference, 'contents', SHA256),
  };
}

function readDisk(disk: StateReader): DiskCapture {
  const kind = disk.text('kind', 16);
  if (kind !== 'reference' && kind !== 'overlay' && kind !== 'raw') disk.refuse('kind', 'is no kind of disk');
  const files = disk.list('files', 2).map(readReference);
  const right = { reference: files.length > 0, overlay: files.length === 1, raw: files.length === 0 };
  if (!right[kind]) disk.refuse('files', `are not those of ${kind}`);
  return { kind, files };
}

function readMemory(memory: StateReader): SnapshotState['memory'] {
  const size = memory.number('size', PAGE_SIZE, MAX_MEMORY);
  if (size % PAGE_SIZE !== 0) memory.refuse('size', 'is not a whole number of pages');
  if (!memory.has('parent')) return { size };
  const parent = memory.object('parent');
  const path = parent.text('path', MAX_PATH);
  if (path.includes('\0')) parent.refuse('path', 'is no path');
  const [id, checksum] = [hexadecimal(parent, 'id', ID), hexadecimal(parent, 'checksum', SHA256)];
  return { size, parent: { path, id, checksum }, extents: readExtents(memory, size / PAGE_SIZE) };
}

/** In order, without overlaps, inside RAM. */
function readExtents(memory: StateReader, pages: number): [number, number][] {
  const flat = memory.raw('extents');
  if (!Array.isArray(flat) || flat.length > MAX_EXTENTS)
    memory.refuse('extents', `are no list of at most ${MAX_EXTENTS}`);
  let end = 0;
  return flat.map((extent: unknown) => {
    const [page, count, ...more] = Array.isArray(extent) ? extent : [];
    const whole = Number.isSafeInteger(page) && Number.isSafeInteger(count) && more.length === 0;
    if (!whole || page < end || count < 1 || page + count > pages) memory.refuse('extents', 'are not in order in RAM');
    end = page + count;
    return [page, count];
  });
}

function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}
