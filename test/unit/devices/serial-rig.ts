import { Serial16550 } from '#dist/devices/serial-16550.js';

/** A UART with a clock that stands still until told, and a host side that can be looked at. */
export class SerialRig {
  time = 1000;
  /** When the armed timer expires; undefined if it is not armed. */
  expiry: number | undefined;
  timersArmed = 0;
  level = false;
  /** Every change of the interrupt line. */
  readonly edges: boolean[] = [];
  rises = 0;
  /** What the host has taken, and how much more it takes. */
  readonly sent: number[] = [];
  room = Number.POSITIVE_INFINITY;
  onWrite: () => void = () => {};
  /** What the host has for the guest. */
  readonly pending: number[] = [];
  reads = 0;
  readonly uart: Serial16550;

  constructor(restFactor?: number) {
    this.uart = new Serial16550({
      interrupt: {
        set: (level) => {
          if (level === this.level) throw new Error('the interrupt line was set to the level it has');
          this.level = level;
          if (level) this.rises++;
          this.edges.push(level);
        },
      },
      output: {
        write: (byte) => {
          this.onWrite();
          if (this.room <= 0) return false;
          this.room--;
          this.sent.push(byte);
          return true;
        },
      },
      input: {
        read: (into) => {
          this.reads++;
          const bytes = this.pending.splice(0, into.length);
          into.set(bytes);
          return bytes.length;
        },
      },
      timer: {
        arm: (microseconds) => {
          if (!(microseconds >= 1)) throw new Error(`timer armed for ${microseconds}`);
          this.timersArmed++;
          this.expiry = this.time + microseconds;
        },
      },
      now: () => this.time,
      restFactor,
    });
  }

  read(register: number): number {
    const data = Uint8Array.of(0xff);
    this.uart.read(register, data);
    return data[0] as number;
  }

  write(register: number, value: number): void {
    this.uart.write(register, Uint8Array.of(value));
  }

  /** Lets time pass, with the timer's expiry on the way. */
  advance(microseconds: number): void {
    const until = this.time + microseconds;
    while (this.expiry !== undefined && this.expiry <= until) {
      this.time = this.expiry;
      this.expiry = undefined;
      this.uart.timerExpired();
    }
    this.time = until;
  }

  /** The host has these bytes for the guest. */
  type(bytes: Iterable<number>): void {
    for (const byte of bytes) this.pending.push(byte);
    this.uart.inputReady();
  }

  /** The host takes this many more bytes. */
  makeRoom(bytes: number): void {
    this.room = bytes;
    this.uart.outputReady();
  }
}

/** A small deterministic generator of 32-bit numbers (xorshift). */
export function random(seed: number): () => number {
  let state = seed;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return state >>> 0;
  };
}
