import type { MessagePort } from 'node:worker_threads';
import type { ConsoleSize } from '../backends/port-stream.js';
import type { ErrorData } from '../errors.js';
import type { ResolvedConfig } from './config.js';
import type { MachineEnd, MachineStats } from './end.js';
import type { MemoryLayer } from './guest-ram.js';
import type { PageSourceLink } from './page-faults.js';
import type { SavedState } from './virtual-machine.js';

/**
 * What a machine thread hears while it waits: a machine, whose messages go by the thread's own port; the eventfd that says
 * that machines have come, several from now on; the memory, in bytes, of the machine that is to be expected; or that it is
 * to end.
 */
export type ThreadOrder =
  | Omit<MachineThreadData, 'port'>
  | { readonly shared: number }
  | { readonly prepare: number }
  | 'end';

/** What the main thread hands a machine thread for each machine. */
export interface MachineThreadData {
  readonly config: ResolvedConfig;
  /** Where the machine's messages come and go. */
  readonly port: MessagePort;
  /** eventfd that says there is a control message. Owned by the main thread, like the sockets. */
  readonly doorbell: number;
  /** Requests with lower numbers were for the machine that the thread had before. */
  readonly firstRequest: number;
  readonly serial: number;
  /** The machine's ends of the sockets of each console port, of each network (none for a tap), of the vsock device. */
  readonly consolePorts: readonly number[];
  readonly networks: readonly (number | undefined)[];
  readonly vsock: number | undefined;
  /** Shared: see ConsoleTail. */
  readonly consoleTail: SharedArrayBuffer;
  /** What the machine begins as, in place of a boot. */
  readonly origin: MachineOrigin | undefined;
  /** Whether anybody listens to log messages. */
  readonly logs: boolean;
}

/** A machine that was saved: what a new one begins as. */
export interface MachineOrigin {
  /** Its memory, the oldest layer first. The descriptors are the main thread's. */
  readonly layers: readonly MemoryLayer[];
  /** In place of layers: who gives it page by page. */
  readonly pages?: PageSourceLink | undefined;
  /** A SavedState, but anybody's input. */
  readonly machine: unknown;
  /** Whether to note from now on which pages are written. */
  readonly track: boolean;
  /** It goes on nowhere else, so that its guest need not hear of it. */
  readonly moved?: boolean;
}

/** `created`: ready to start. */
export type MachineState = 'created' | 'running' | 'paused' | 'ended';

/** Which pages of guest memory a file gets. */
export interface SavePages {
  /** Descriptor of the main thread's, open for writing, as long as the memory and empty. */
  readonly fd: number;
  /** All of them, or those written since the last save that asked for `track`. */
  readonly pages: 'all' | 'dirty';
  /** Whether to note from now on which pages are written. */
  readonly track: boolean;
}

/**
 * A step of handing out guest memory: `begin` starts with all pages and notes from now on which are written, `round` adds
 * those that were written since, `more` gives the next of them, `end` is the end of it.
 */
export type PagesStep = 'begin' | 'round' | 'more' | 'end';

/** What a step of `pages` gave. */
export interface PageBatch {
  /** Of `more`; see PageSource. */
  readonly payload: Uint8Array | undefined;
  /** Pages that are still to be given. */
  readonly remaining: number;
}

/** What `save` gave. */
export interface SavedMachine {
  readonly machine: SavedState;
  /** Of `dirty`: the pieces that were written, each first page and number of pages. */
  readonly extents: readonly (readonly [page: number, count: number])[] | undefined;
  /** Bytes written. */
  readonly bytes: number;
}

/** Main thread to machine thread; each is answered by a reply with its id. */
export interface ControlRequest {
  readonly id: number;
  /**
   * `hold` stops the vCPUs until `release` and answers when no device works on a request and what the guest wrote is on
   * its disks; one that is refused holds nothing. `save` is for in between, as is `handOver`, which lets another process
   * open the disks until `release`. `fetch` answers when all of memory is there that a page source has; the guest runs
   * meanwhile. `migrated` ends the machine, since it goes on elsewhere.
   */
  readonly command:
    | 'start'
    | 'pause'
    | 'resume'
    | 'stop'
    | 'query'
    | 'resize'
    | 'fetch'
    | 'hold'
    | 'save'
    | 'handOver'
    | 'release'
    | 'pages'
    | 'migrated';
  /** Of `save`: undefined leaves memory out. */
  readonly save?: SavePages;
  readonly pages?: PagesStep;
  /** Of `resize`: the console port, by number, and its size. */
  readonly resize?: { readonly port: number; readonly size: ConsoleSize };
}

/** Main thread to machine thread, for a user's device by its place in the configuration. There is no reply. */
export type DeviceRequest =
  | { readonly device: number; readonly value: unknown }
  /** So many more messages of the device were taken. */
  | { readonly device: number; readonly taken: number };

/** Where the guest finds a user's device. */
export interface DevicePlace {
  /** Guest physical address and length of its registers. */
  readonly base: number;
  readonly length: number;
  /** undefined: it has no interrupt. */
  readonly gsi: number | undefined;
}

/** What a user's device has to say; each counts as a message that is to be taken. */
export type DeviceReport =
  | { readonly type: 'device-message'; readonly device: number; readonly value: unknown }
  | { readonly type: 'device-failed'; readonly device: number; readonly why: string };

export interface ControlAnswer {
  readonly state: MachineState;
  readonly saved?: SavedMachine | undefined;
  readonly pages?: PageBatch | undefined;
  /** Of `query`. */
  readonly stats?: MachineStats | undefined;
}

/** Machine thread to main thread. */
export type MachineMessage =
  | { readonly type: 'ready'; readonly devices: readonly DevicePlace[] }
  | DeviceReport
  | { readonly type: 'failed'; readonly error: ErrorData }
  | { readonly type: 'reply'; readonly id: number; readonly answer: ControlAnswer }
  | { readonly type: 'refusal'; readonly id: number; readonly error: ErrorData }
  | { readonly type: 'log'; readonly level: 'debug' | 'info' | 'warn'; readonly message: string }
  | { readonly type: 'reset' }
  | { readonly type: 'drive-error'; readonly drive: number; readonly message: string }
  | { readonly type: 'ended'; readonly end: MachineEnd; readonly stats: MachineStats }
  /** The last: it uses no descriptor of the main thread's any more. A thread of its own waits for another, or ends. */
  | { readonly type: 'gone'; readonly reusable: boolean };
