/** Bytes of an overlay that come from one place: its own file, or the base. */
export const CLUSTER = 4096;

/** The bitmap is written in pieces of so many bytes. */
const BLOCK = 4096;
/** A write takes at most so many blocks. */
const MAX_BLOCKS = 16;

/** Which clusters an overlay has: one bit each, the first in the low bit of the first byte. Bits are only ever set. */
export class AllocationBitmap {
  readonly #bytes: Uint8Array;
  readonly #clusters: number;
  /** Blocks with bits that the file may not have. */
  readonly #dirty = new Set<number>();

  /** @param bytes room for every cluster. */
  constructor(bytes: Uint8Array, clusters: number) {
    this.#bytes = bytes;
    this.#clusters = clusters;
  }

  has(cluster: number): boolean {
    return (((this.#bytes[Math.floor(cluster / 8)] as number) >> (cluster % 8)) & 1) !== 0;
  }

  /** The first cluster from `first` on, below `end`, for which has() is `value`; `end` if there is none. */
  find(value: boolean, first: number, end: number): number {
    const others = value ? 0 : 0xff;
    for (let cluster = first; cluster < end; ) {
      if (cluster % 8 === 0 && this.#bytes[cluster / 8] === others) cluster += 8;
      else if (this.has(cluster) === value) return cluster;
      else cluster++;
    }
    return end;
  }

  /** @param last inclusive. */
  set(first: number, last: number): void {
    if (this.find(false, first, last + 1) > last) return;
    for (let cluster = first; cluster <= last; cluster++) {
      const at = Math.floor(cluster / 8);
      this.#bytes[at] = (this.#bytes[at] as number) | (1 << (cluster % 8));
    }
    const lastBlock = Math.floor(last / 8 / BLOCK);
    for (let block = Math.floor(first / 8 / BLOCK); block <= lastBlock; block++) this.#dirty.add(block);
  }

  /** Whether a bit is set that no cluster has. */
  get overflows(): boolean {
    const spare = this.#bytes.subarray(Math.ceil(this.#clusters / 8)).some((byte) => byte !== 0);
    if (spare || this.#clusters % 8 === 0) return spare;
    return (this.#bytes[Math.floor(this.#clusters / 8)] as number) >> (this.#clusters % 8) !== 0;
  }

  /** Copies of what the file lacks now, to be written at their offsets; it counts as written until markDirty(). */
  takeDirty(): DirtyPiece[] {
    const blocks = [...this.#dirty].sort((a, b) => a - b);
    this.#dirty.clear();
    const pieces: DirtyPiece[] = [];
    for (let i = 0; i < blocks.length; ) {
      const first = blocks[i] as number;
      let count = 1;
      while (count < MAX_BLOCKS && blocks[i + count] === first + count) count++;
      pieces.push({ offset: first * BLOCK, bytes: this.#bytes.slice(first * BLOCK, (first + count) * BLOCK) });
      i += count;
    }
    return pieces;
  }

  /** The file does not have these after all. */
  markDirty(pieces: readonly DirtyPiece[]): void {
    for (const { offset, bytes } of pieces) {
      for (let at = offset; at < offset + bytes.length; at += BLOCK) this.#dirty.add(at / BLOCK);
    }
  }
}

/** A part of a bitmap. */
export interface DirtyPiece {
  /** From the start of the bitmap, in bytes. */
  readonly offset: number;
  readonly bytes: Uint8Array;
}
