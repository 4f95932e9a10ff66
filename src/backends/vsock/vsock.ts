import type { VsockListener } from './listener.js';
import type { VsockStream } from './stream.js';

/** How long a connection may take to be made. */
export interface VsockConnectOptions {
  /** Gives up when it is aborted, with its reason. */
  readonly signal?: AbortSignal;
  /** Milliseconds after which to give up, 1 to 2^31 - 1; default 10000. */
  readonly timeout?: number;
}

/** A machine's vsock: connections of the host to ports of the guest, and of the guest to ports of the host (CID 2). */
export interface Vsock {
  /** The guest's address. */
  readonly cid: number;
  /**
   * Connects to a port of the guest, 0 to 2^32 - 2.
   * @throws VsockError when it is refused, nothing answers in time or the guest has no driver running; the signal's
   * reason; the error of the machine's end.
   */
  connect(port: number, options?: VsockConnectOptions): Promise<VsockStream>;
  /**
   * Accepts connections of the guest to a port of the host, 0 to 2^32 - 2. It may be called before the guest runs, and
   * outlives its resets.
   * @throws UsageError if that port has a listener.
   */
  listen(port: number): VsockListener;
}
