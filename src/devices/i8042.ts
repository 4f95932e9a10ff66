import type { StateReader } from '../state-reader.js';
import { ByteDevice } from './byte-device.js';

const DATA = 0;
/** Between its own is the system's control port B. */
const PORT_B = 1;
const STATUS_COMMAND = 4;

/** Status register bits. */
const STATUS = { OUTPUT_FULL: 0x01, SELF_TEST_PASSED: 0x04, LAST_WAS_COMMAND: 0x08, NOT_LOCKED: 0x10 } as const;

/** Configuration byte bits: the keyboard's and the auxiliary port's clocks stopped, and translation. */
const CONFIG = { KEYBOARD_OFF: 0x10, AUX_OFF: 0x20, TRANSLATE: 0x40 } as const;

/** Output port: bit 0 is the processor's reset line, active low; bit 1 opens A20. */
const OUTPUT_PORT_RESET = 0xcf;

/** What a keyboard that is not there "answers": resend. */
const NO_KEYBOARD = 0xfe;

/** Reads of stale data in a row, without a command, after which the output buffer appears empty. */
const STALE_READS = 1024;

/** System control port B: the PIT's channel 2 and the speaker. */
export interface PortB {
  read(): number;
  write(value: number): void;
}

/** The state of the controller as plain data. */
export interface I8042State {
  readonly config: number;
  readonly outputPort: number;
  /** The command whose data byte comes next; -1 if none. */
  readonly command: number;
  /** The answer that waits in the output buffer; -1 if none. */
  readonly answer: number;
  readonly staleReads: number;
  readonly lastWasCommand: boolean;
}

/**
 * The keyboard controller, without keyboard or mouse: there for its reset line, by which Linux reboots
 * (arch/x86/kernel/reboot.c, BOOT_KBD: wait for input buffer empty, write 0xfe).
 *
 * Linux's driver finds out quickest, and without a timeout, that there is nothing to drive when the output buffer does
 * not run empty: i8042_flush() in drivers/input/serio/i8042.c reads 16 bytes, sees one more and reports "No controller
 * found". Everything else costs more: an unanswered command is polled for 10000 × 50 µs, and a controller that answers all
 * of them gets a keyboard port whose probe waits for a keyboard. So the output buffer looks full of 0xff, though not
 * for ever, as a guest may read until it is empty. Commands are answered at once by what a controller with nothing
 * attached says, so that a guest that does not flush first finds a working one. Interrupts 1 and 12 are never raised.
 */
export class I8042 extends ByteDevice {
  readonly name = 'i8042';
  readonly #onReset: () => void;
  readonly #portB: PortB | undefined;
  #config = 0;
  #outputPort = 0;
  #command = -1;
  #answer = -1;
  #staleReads = 0;
  #lastWasCommand = false;

  /** @param onReset the guest pulses the reset line; may be called again and again. @param portB what is at port 0x61. */
  constructor(onReset: () => void, portB?: PortB) {
    super();
    this.#onReset = onReset;
    this.#portB = portB;
    this.reset();
  }

  reset(): void {
    this.#config = CONFIG.KEYBOARD_OFF | CONFIG.AUX_OFF | CONFIG.TRANSLATE;
    this.#outputPort = OUTPUT_PORT_RESET;
    this.#command = this.#answer = -1;
    this.#staleReads = 0;
    this.#lastWasCommand = false;
  }

  override readByte(offset: number): number {
    if (offset === DATA) return this.#readData();
    if (offset === PORT_B && this.#portB) return this.#portB.read();
    if (offset !== STATUS_COMMAND) return 0xff;
    // Bit 1, input buffer full, is never set: whatever is written is taken at once.
    let status: number = STATUS.NOT_LOCKED | STATUS.SELF_TEST_PASSED;
    if (this.#answer >= 0 || this.#staleReads < STALE_READS) status |= STATUS.OUTPUT_FULL;
    if (this.#lastWasCommand) status |= STATUS.LAST_WAS_COMMAND;
    return status;
  }

  override writeByte(offset: number, value: number): void {
    if (offset === PORT_B) this.#portB?.write(value);
    if (offset !== DATA && offset !== STATUS_COMMAND) return;
    this.#lastWasCommand = offset === STATUS_COMMAND;
    if (this.#lastWasCommand) this.#runCommand(value);
    else this.#writeData(value);
  }

  save(): I8042State {
    return {
      config: this.#config,
      outputPort: this.#outputPort,
      command: this.#command,
      answer: this.#answer,
      staleReads: this.#staleReads,
      lastWasCommand: this.#lastWasCommand,
    };
  }

  restore(state: StateReader): void {
    this.#config = state.number('config', 0, 0xff);
    this.#outputPort = state.number('outputPort', 0, 0xff);
    this.#command = state.number('command', -1, 0xff);
    this.#answer = state.number('answer', -1, 0xff);
    this.#staleReads = state.number('staleReads', 0, STALE_READS);
    this.#lastWasCommand = state.boolean('lastWasCommand');
  }

  #readData(): number {
    const answer = this.#answer;
    this.#answer = -1;
    if (answer >= 0) return answer & 0xff;
    if (this.#staleReads < STALE_READS) this.#staleReads++;
    return 0xff;
  }

  #runCommand(command: number): void {
    this.#staleReads = 0;
    this.#command = this.#answer = -1;
    // 0xf0 to 0xff pulse the output port's bits 3..0 that are zero in the command; bit 0 is the reset line.
    if (command >= 0xf0) {
      if ((command & 1) === 0) this.#onReset();
      return;
    }
    switch (command) {
      case 0x20: // read configuration
        this.#answer = this.#config;
        break;
      case 0xa7: // disable, enable auxiliary port
        this.#config |= CONFIG.AUX_OFF;
        break;
      case 0xa8:
        this.#config &= ~CONFIG.AUX_OFF;
        break;
      case 0xa9: // test auxiliary port: clock line stuck low
        this.#answer = 0x01;
        break;
      case 0xaa: // self-test: passed
        this.#answer = 0x55;
        break;
      case 0xab: // test keyboard port: no error
        this.#answer = 0x00;
        break;
      case 0xad: // disable, enable keyboard
        this.#config |= CONFIG.KEYBOARD_OFF;
        break;
      case 0xae:
        this.#config &= ~CONFIG.KEYBOARD_OFF;
        break;
      case 0xc0: // read input port: keyboard not locked
        this.#answer = 0x80;
        break;
      case 0xd0: // read output port
        this.#answer = this.#outputPort;
        break;
      case 0x60: // write configuration, output port; put a byte into the output buffer as keyboard, as mouse; to mouse
      case 0xd1:
      case 0xd2:
      case 0xd3:
      case 0xd4:
        this.#command = command;
        break;
    }
  }

  #writeData(value: number): void {
    const command = this.#command;
    this.#command = -1;
    this.#answer = -1;
    switch (command) {
      case 0x60:
        this.#config = value;
        break;
      case 0xd1:
        // Kept high in the register: the line is released by the reset it causes.
        this.#outputPort = value | 1;
        if ((value & 1) === 0) this.#onReset();
        break;
      case 0xd2:
      case 0xd3: // without the status bit that marks it as the mouse's: Linux takes that for "no mouse port"
        this.#answer = value;
        break;
      default:
        this.#answer = NO_KEYBOARD;
    }
  }
}
