import { createHash } from 'node:crypto';
import { SnapshotError } from '../errors.js';
import { MAX_EXTENTS } from '../machine/dirty-extents.js';
import { PAGE_SIZE } from '../machine/layout.js';
import type { SavedState } from '../machine/virtual-machine.js';
import { StateReader } from '../state-reader.js';
import { checksumsLength } from './memory-checksums.js';

/**
 * A snapshot is a folder of these files, described in docs/snapshots.md:
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
const MAX_PATH = 4096;
const MAX_FILES = 64;
const MAX_MEMORY = 2 ** 40;

/** A file of the host that a snapshot refers to. All but the path must be the same when it is restored. */
export interface FileReference {
  readonly path: string;
  /** As decimal text: numbers of 64 bits. */
  readonly device: string;
  readonly inode: string;
  readonly size: string;
  readonly modifiedNs: string;
  readonly changedNs: string;
}

/** What a drive becomes when it is restored. */
export type DiskCapture =
  /** Opened where it is. */
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
  /** Files that the guest would be booted from. */
  readonly boot: readonly FileReference[];
  readonly disks: readonly DiskCapture[];
  readonly memory: {
    readonly size: number;
    /** A differential snapshot's other pages are those of this one, by its path from this folder. */
    readonly parent?: { readonly path: string; readonly id: string };
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
  readonly boot: readonly FileReference[];
  readonly disks: readonly DiskCapture[];
  readonly memory: SnapshotState['memory'];
  readonly memoryChecksums: Uint8Array | undefined;
  readonly machine: unknown;
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
  let value: unknown;
  try {
    value = JSON.parse(body.toString());
  } catch (cause) {
    throw new SnapshotError(`${path}: damaged: it is no JSON`, { cause });
  }
  if (typeof value !== 'object' || value === null) throw new SnapshotError(`${path}: damaged: it is no object`);
  const state = new StateReader(value, '');
  const id = state.text('id', 32);
  if (!ID.test(id)) state.refuse('id', 'is not 32 hexadecimal digits');
  const host = state.object('host');
  const memory = readMemory(state.object('memory'));
  const sums = 'memoryChecksums';
  return {
    id,
    created: state.text('created', 64),
    host: { cpu: host.text('cpu', 256), kernel: host.text('kernel', 256), tsvisor: host.text('tsvisor', 64) },
    config: state.raw('config'),
    boot: state.list('boot', MAX_FILES).map(readReference),
    disks: state.list('disks', MAX_FILES).map(readDisk),
    memory,
    memoryChecksums: state.has(sums) ? state.bytes(sums, checksumsLength(memory.size)) : undefined,
    machine: state.raw('machine'),
  };
}

function readReference(reference: StateReader): FileReference {
  const decimal = (name: string) => {
    const text = reference.text(name, 24);
    return /^-?\d+$/.test(text) ? text : reference.refuse(name, 'is not a decimal number');
  };
  return {
    path: reference.text('path', MAX_PATH),
    device: decimal('device'),
    inode: decimal('inode'),
    size: decimal('size'),
    modifiedNs: decimal('modifiedNs'),
    changedNs: decimal('changedNs'),
  };
}

function readDisk(disk: StateReader): DiskCapture {
  const kind = disk.text('kind', 16);
  if (kind !== 'reference' && kind !== 'overlay' && kind !== 'raw') disk.refuse('kind', 'is no kind of disk');
  return { kind, files: disk.list('files', 2).map(readReference) };
}

function readMemory(memory: StateReader): SnapshotState['memory'] {
  const size = memory.number('size', PAGE_SIZE, MAX_MEMORY);
  if (size % PAGE_SIZE !== 0) memory.refuse('size', 'is not a whole number of pages');
  if (!memory.has('parent')) return { size };
  const parent = memory.object('parent');
  const id = parent.text('id', 32);
  if (!ID.test(id)) parent.refuse('id', 'is not 32 hexadecimal digits');
  return { size, parent: { path: parent.text('path', MAX_PATH), id }, extents: readExtents(memory, size / PAGE_SIZE) };
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
