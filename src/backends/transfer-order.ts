/** Pieces of guest memory that one transfer takes at most: as many as a chain of a queue has. */
export const MAX_PIECES = 256;
/** Bytes. */
export const MAX_PREFIX = 64;

// As in addon/guest_io.cc.
const OPERATION = 0;
const FD = 1;
const OFFSET = 2;
const FLAGS = 3;
const COUNT = 4;
const PREFIX_LENGTH = 5;
const PREFIX = 6;
const PAIRS = PREFIX + MAX_PREFIX / 8;

/** What NativeGuestIo.transfer() is to do. As its arguments this would take longer than a quick system call. */
export class TransferOrder {
  readonly words = new Float64Array(PAIRS + 2 * MAX_PIECES);
  readonly #prefix = new Uint8Array(this.words.buffer, 8 * PREFIX, MAX_PREFIX);

  /**
   * @param operation 0 to read, 1 to write. @param offset bytes; negative for a stream. @param flags RWF_.
   * @param pairs guest physical addresses and lengths, of which the first `count` count.
   * @param prefix of a write: bytes of the host before those of the guest, at most MAX_PREFIX.
   */
  set(
    operation: number,
    fd: number,
    offset: number,
    flags: number,
    pairs: Float64Array,
    count: number,
    prefix?: Uint8Array,
  ): void {
    const { words } = this;
    const pieces = Math.min(count, MAX_PIECES);
    words[OPERATION] = operation;
    words[FD] = fd;
    words[OFFSET] = offset;
    words[FLAGS] = flags;
    words[COUNT] = pieces;
    for (let i = 0; i < 2 * pieces; i++) words[PAIRS + i] = pairs[i] as number;
    const length = prefix ? prefix.length : 0;
    words[PREFIX_LENGTH] = length;
    for (let i = 0; i < length; i++) this.#prefix[i] = (prefix as Uint8Array)[i] as number;
  }
}
