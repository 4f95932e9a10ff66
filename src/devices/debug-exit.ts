import { ByteDevice } from './byte-device.js';

/** A port by which a guest ends its machine: a byte written is the exit code. A wider write counts by its low byte. */
export class DebugExit extends ByteDevice {
  readonly name = 'debug-exit';
  readonly #onExit: (code: number) => void;

  /** @param onExit may be called again before the machine has stopped. */
  constructor(onExit: (code: number) => void) {
    super();
    this.#onExit = onExit;
  }

  override readByte(): number {
    return 0xff;
  }

  override writeByte(offset: number, value: number): void {
    if (offset === 0) this.#onExit(value);
  }
}
