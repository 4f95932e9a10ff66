import { PAGE_SIZE } from '../machine/layout.js';
import { MAX_BATCH_DATA, MAX_BATCH_PAGES } from '../machine/page-batches.js';
import { STATE_LIMIT } from '../snapshot/format.js';

/** Changes with every change of what is said. It is the first thing that either side says. */
export const PROTOCOL_VERSION = 1;

/**
 * What the two sides say to each other, inside TLS: `u32 type, u32 length`, then so many bytes; little-endian. Described
 * in docs/migration.md.
 */
export const FrameType = {
  /** Source: `u32 version`, then what decodeState() reads, without what changes while the machine runs. */
  hello: 1,
  /** Source: see PageSource. */
  pages: 2,
  /** Source: the round is over. Target: all of it was taken. */
  round: 3,
  /** Source: `u8`, 1 when it is to stay paused, then what decodeState() reads. The machine stands still, and its disks may be opened. */
  state: 4,
  /** Source: the machine is the target's from here on. */
  commit: 5,
  /** Source: the machine has ended here. Nothing more will be asked. */
  done: 6,
  /** Source, on another connection: `u32 version`, then the id of the migration whose outcome it wants to know. */
  ask: 7,
  /** Target: `u32 version`, then where its process is, as JSON. */
  accept: 8,
  /** Target: it can go on with the machine at once. */
  ready: 9,
  /** Target: the machine runs. */
  running: 10,
  /** Either: it does not go on, for the reason in the text. From the target: the machine does not run there, nor will it. */
  refused: 11,
} as const;
export type FrameType = (typeof FrameType)[keyof typeof FrameType];

/** Most bytes of each type. */
export const FRAME_LIMITS: Readonly<Record<FrameType, number>> = {
  [FrameType.hello]: 2 ** 20,
  [FrameType.pages]: 4 + 4 * MAX_BATCH_PAGES + MAX_BATCH_DATA * PAGE_SIZE,
  [FrameType.round]: 0,
  [FrameType.state]: 1 + STATE_LIMIT,
  [FrameType.commit]: 0,
  [FrameType.done]: 0,
  [FrameType.ask]: 36,
  [FrameType.accept]: 4096,
  [FrameType.ready]: 0,
  [FrameType.running]: 0,
  [FrameType.refused]: 1024,
};

/** A body that begins with the version. */
export function versioned(body: Uint8Array): Buffer {
  const version = Buffer.alloc(4);
  version.writeUInt32LE(PROTOCOL_VERSION);
  return Buffer.concat([version, body]);
}

/** Text of the other side for a message: one line, nothing that a terminal acts on. */
export function printable(text: Uint8Array): string {
  return Buffer.from(text)
    .toString('utf8')
    .replaceAll(/\p{C}+/gu, ' ')
    .slice(0, 500);
}
