/**
 * What a legacy device needs from its machine. The machine passes these in; nothing in this folder knows how they are
 * done, so that every device runs in a plain unit test.
 */

/** A level-triggered interrupt line. */
export interface InterruptLine {
  /** Called only when the level changes; the line starts low. */
  set(level: boolean): void;
}

/** Where a device sends bytes. It must not block. */
export interface ByteSink {
  /**
   * Takes one byte.
   * @returns false when there is no room: the byte was not taken, and the device is told by its `outputReady()` when
   * there is room again.
   */
  write(byte: number): boolean;
}

/** Where a device gets bytes. It must not block. */
export interface ByteSource {
  /**
   * Copies what is there into `into` and returns how many bytes that was. A short count says that the source is empty
   * for now: the device does not ask again before its `inputReady()` is called. After a full count it asks again by
   * itself. (So readiness is edge-triggered: a poller need not watch a source that the device is not emptying.)
   */
  read(into: Uint8Array): number;
}

/** A one-shot timer of one device. */
export interface OneShotTimer {
  /**
   * Calls the device's `timerExpired()` once, after this time or somewhat later. Arming an armed timer replaces its time.
   * @param microseconds at least 1.
   */
  arm(microseconds: number): void;
}
