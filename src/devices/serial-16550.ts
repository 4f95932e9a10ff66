import type { StateReader } from '../state-reader.js';
import { ByteDevice } from './byte-device.js';
import { ByteFifo } from './byte-fifo.js';
import type { ByteSink, ByteSource, InterruptLine, OneShotTimer } from './host.js';
import { DEFAULT_REST_FACTOR, SerialInput } from './serial-input.js';
import { FCR, IER, IIR, LCR_DLAB, LSR, MCR, MSR, RX_TRIGGER, UART } from './serial-registers.js';

/** What a UART needs from its machine. */
export interface SerialHost {
  readonly interrupt: InterruptLine;
  readonly output: ByteSink;
  readonly input: ByteSource;
  readonly timer: OneShotTimer;
  /** A monotonic clock in microseconds. */
  now(): number;
  /** How many times as long as the guest took to empty the FIFO it is left alone before more input; default 2. */
  readonly restFactor?: number | undefined;
}

/** The state of a UART as plain data. Pacing is not part of it: it begins anew. */
export interface SerialState {
  readonly ier: number;
  readonly fcr: number;
  readonly lcr: number;
  readonly mcr: number;
  readonly scr: number;
  readonly divisor: number;
  /** Bytes in the receiver FIFO, oldest first, and whether the guest itself sent them in loopback mode. */
  readonly rx: readonly number[];
  readonly rxLooped: boolean;
  /** Bytes from the host that the guest has not been shown. */
  readonly line: readonly number[];
  /** Bytes that the host has not taken. */
  readonly tx: readonly number[];
  readonly overrunError: boolean;
  readonly threPending: boolean;
  readonly modemDeltas: number;
  readonly rtsSeen: boolean;
}

/** After this many reads of LSR in a row without a transmission a guest without receive interrupts counts as polling. */
const POLLING = 16;

/** What the other end of the line drives: carrier detect, data set ready, clear to send. */
const MODEM_LINES = MSR.DCD | MSR.DSR | MSR.CTS;

/** The divisor of 9600 baud, as firmware leaves it; any other does as well. */
const RESET_DIVISOR = 12;

/**
 * A 16550A UART (National Semiconductor PC16550D datasheet, section 8). Sections in comments are of that datasheet.
 *
 * Differences from the chip, all of them kind to guests: there is no baud rate, so a byte is sent as soon as the host
 * takes it, and a character timeout (table IV) is indicated at once. Breaks, parity and framing errors do not happen. The
 * host's bytes are not lost when a guest clears its receiver FIFO, as Linux does in every open and set_termios: they go
 * back to the line and arrive again later. Input waits until a guest has use for it: receive interrupts enabled or LSR
 * polled, and RTS not dropped once it was raised.
 */
export class Serial16550 extends ByteDevice {
  readonly name = 'serial';
  readonly #interrupt: InterruptLine;
  readonly #output: ByteSink;
  readonly #input: SerialInput;
  readonly #rx = new ByteFifo();
  readonly #tx = new ByteFifo();
  #ier = 0;
  #fcr = 0;
  #lcr = 0;
  #mcr = 0;
  #scr = 0;
  #divisor = RESET_DIVISOR;
  #rxLooped = false;
  #overrunError = false;
  #threPending = false;
  #modemDeltas = 0;
  #rtsSeen = false;
  #polls = 0;
  #level = false;
  #sending = false;
  #overruns = 0;

  constructor(host: SerialHost) {
    super();
    this.#interrupt = host.interrupt;
    this.#output = host.output;
    this.#input = new SerialInput(host.input, host.timer, () => host.now(), host.restFactor ?? DEFAULT_REST_FACTOR);
  }

  /** Bytes dropped because the guest wrote them although the transmitter had no room, as the chip does. */
  get overruns(): number {
    return this.#overruns;
  }

  /** The host has input. May be called at any time. */
  inputReady(): void {
    this.#input.sourceReady();
    this.#pump();
  }

  /** The host takes output again. May be called at any time. */
  outputReady(): void {
    if (this.#tx.length === 0 || this.#sending) return;
    this.#sending = true; // a sink may find room, and say so, while it takes a byte
    while (this.#tx.length > 0 && this.#output.write(this.#tx.peek())) this.#tx.shift();
    this.#sending = false;
    if (this.#tx.length === 0) this.#transmitterEmpty();
  }

  /** The timer given in the constructor has expired. */
  timerExpired(): void {
    this.#input.timerExpired();
    this.#pump();
  }

  /** Master reset (table II). Bytes from the host that the guest has not read stay on the line. */
  reset(): void {
    this.#clearReceiver();
    this.#tx.clear();
    this.#ier = this.#fcr = this.#lcr = this.#mcr = this.#scr = 0;
    this.#divisor = RESET_DIVISOR;
    this.#overrunError = this.#threPending = this.#rtsSeen = false;
    this.#modemDeltas = this.#polls = 0;
    this.#update();
  }

  override readByte(offset: number): number {
    switch (offset) {
      case UART.DATA:
        return this.#lcr & LCR_DLAB ? this.#divisor & 0xff : this.#receive();
      case UART.IER:
        return this.#lcr & LCR_DLAB ? this.#divisor >> 8 : this.#ier;
      case UART.IIR_FCR:
        return this.#identify();
      case UART.LCR:
        return this.#lcr;
      case UART.MCR:
        return this.#mcr;
      case UART.LSR:
        return this.#lineStatus();
      case UART.MSR:
        return this.#modemStatus();
      case UART.SCR:
        return this.#scr;
      default:
        return 0xff;
    }
  }

  override writeByte(offset: number, value: number): void {
    switch (offset) {
      case UART.DATA:
        if (this.#lcr & LCR_DLAB) this.#divisor = (this.#divisor & 0xff00) | value;
        else this.#transmit(value);
        break;
      case UART.IER:
        if (this.#lcr & LCR_DLAB) this.#divisor = (this.#divisor & 0xff) | (value << 8);
        else this.#writeIer(value & IER.ALL);
        break;
      case UART.IIR_FCR:
        this.#writeFcr(value);
        break;
      case UART.LCR:
        this.#lcr = value;
        break;
      case UART.MCR:
        this.#writeMcr(value & MCR.ALL);
        break;
      case UART.SCR:
        this.#scr = value;
        break;
      // LSR and MSR are for reading only (8.6.3: writing LSR is for factory tests).
    }
  }

  save(): SerialState {
    return {
      ier: this.#ier,
      fcr: this.#fcr,
      lcr: this.#lcr,
      mcr: this.#mcr,
      scr: this.#scr,
      divisor: this.#divisor,
      rx: this.#rx.toArray(),
      rxLooped: this.#rxLooped,
      line: this.#input.save(),
      tx: this.#tx.toArray(),
      overrunError: this.#overrunError,
      threPending: this.#threPending,
      modemDeltas: this.#modemDeltas,
      rtsSeen: this.#rtsSeen,
    };
  }

  /** Takes over a saved state, drives the interrupt line, and goes on with what was to be sent and received. */
  restore(state: StateReader): void {
    const bytes = (name: string, limit: number) => state.numbers(name, limit, 0, 0xff);
    this.#ier = state.number('ier', 0, 0xff) & IER.ALL;
    this.#fcr = state.number('fcr', 0, 0xff);
    this.#lcr = state.number('lcr', 0, 0xff);
    this.#mcr = state.number('mcr', 0, 0xff) & MCR.ALL;
    this.#scr = state.number('scr', 0, 0xff);
    this.#divisor = state.number('divisor', 0, 0xffff);
    this.#rx.load(bytes('rx', ByteFifo.CAPACITY));
    this.#rxLooped = state.boolean('rxLooped');
    this.#tx.load(bytes('tx', ByteFifo.CAPACITY));
    this.#input.restore(bytes('line', ByteFifo.CAPACITY - (this.#rxLooped ? 0 : this.#rx.length)));
    this.#overrunError = state.boolean('overrunError');
    this.#threPending = state.boolean('threPending');
    this.#modemDeltas = state.number('modemDeltas', 0, 0x0f);
    this.#rtsSeen = state.boolean('rtsSeen');
    this.#polls = 0;
    this.#update();
    this.outputReady();
    this.inputReady();
  }

  /** How many bytes the receiver or the transmitter holds. */
  get #capacity(): number {
    return this.#fcr & FCR.ENABLE ? ByteFifo.CAPACITY : 1;
  }

  #writeIer(value: number): void {
    // 8.8 and 8.11: enabling the THRE interrupt raises it when the transmitter is empty, even if it was identified before.
    if ((value & IER.THRI) === 0) this.#threPending = false;
    else if ((this.#ier & IER.THRI) === 0) this.#threPending = this.#tx.length === 0;
    this.#ier = value;
    this.#update();
    this.#pump();
  }

  /** 8.4: bits other than FCR0 are taken only together with FCR0; changing FCR0 clears both FIFOs. */
  #writeFcr(value: number): void {
    const toggled = ((value ^ this.#fcr) & FCR.ENABLE) !== 0;
    const enabled = (value & FCR.ENABLE) !== 0;
    this.#fcr = enabled ? value & (FCR.ENABLE | FCR.DMA | FCR.TRIGGER) : 0;
    if (toggled || (enabled && value & FCR.CLEAR_RX)) this.#clearReceiver();
    if ((toggled || (enabled && value & FCR.CLEAR_TX)) && this.#tx.length > 0) {
      this.#tx.clear();
      this.#transmitterEmpty();
    }
    this.#update();
    this.#pump();
  }

  /** 8.7; a change of the modem lines that entering, leaving or using loopback causes sets the deltas in MSR (8.9). */
  #writeMcr(value: number): void {
    const before = this.#modemLines;
    if (value & ~this.#mcr & MCR.LOOP && !this.#rxLooped) this.#input.takeBack(this.#rx);
    this.#mcr = value;
    if ((value & (MCR.RTS | MCR.LOOP)) === MCR.RTS) this.#rtsSeen = true;
    const after = this.#modemLines;
    const changed = (before ^ after) >> 4;
    // TERI is the trailing edge only: RI going away.
    this.#modemDeltas |= changed & ((after >> 4) & MSR.TERI ? ~MSR.TERI : 0x0f);
    this.#update();
    this.#pump();
  }

  get #modemLines(): number {
    const mcr = this.#mcr;
    if ((mcr & MCR.LOOP) === 0) return MODEM_LINES;
    return (
      (mcr & MCR.RTS ? MSR.CTS : 0) |
      (mcr & MCR.DTR ? MSR.DSR : 0) |
      (mcr & MCR.OUT1 ? MSR.RI : 0) |
      (mcr & MCR.OUT2 ? MSR.DCD : 0)
    );
  }

  #transmit(value: number): void {
    this.#polls = 0;
    if (this.#mcr & MCR.LOOP) this.#loopBack(value);
    else if (this.#tx.length > 0 || !this.#output.write(value)) {
      // THRE is clear from here until outputReady. Linux writes 16 bytes whenever it sees THRE, so all 16 have room.
      if (this.#tx.length < this.#capacity) this.#tx.push(value);
      else this.#overruns++;
    }
    this.#transmitterEmpty();
  }

  /** 8.7 bit 4: the transmitter feeds the receiver; 8.6.3 bit 1: an overrun spares the FIFO but overwrites a lone RBR. */
  #loopBack(value: number): void {
    this.#rxLooped = true;
    if (this.#rx.length < this.#capacity) {
      this.#rx.push(value);
      return;
    }
    this.#overrunError = true;
    if ((this.#fcr & FCR.ENABLE) === 0) {
      this.#rx.clear();
      this.#rx.push(value);
    }
  }

  /** A write to THR has cleared the THRE interrupt; it is raised again when the transmitter is, or becomes, empty. */
  #transmitterEmpty(): void {
    this.#threPending = (this.#ier & IER.THRI) !== 0 && this.#tx.length === 0;
    this.#update();
  }

  #receive(): number {
    if (this.#rx.length === 0) return 0;
    const value = this.#rx.shift();
    if (this.#rx.length === 0) {
      if (!this.#rxLooped) this.#input.drained();
      this.#rxLooped = false;
      this.#pump();
    }
    this.#update();
    return value;
  }

  #clearReceiver(): void {
    if (this.#rxLooped) this.#rx.clear();
    else this.#input.takeBack(this.#rx);
    this.#rxLooped = false;
  }

  #identify(): number {
    const source = this.#source();
    if (source === IIR.THRI) {
      this.#threPending = false;
      this.#update();
    }
    return this.#fcr & FCR.ENABLE ? source | IIR.FIFO_ENABLED : source;
  }

  #lineStatus(): number {
    let value = this.#tx.length === 0 ? LSR.THRE | LSR.TEMT : 0;
    // A guest that waits for THRE is not one that waits for input.
    if (value && this.#rx.length === 0 && (this.#ier & IER.RDI) === 0) this.#polled();
    if (this.#rx.length > 0) value |= LSR.DR;
    if (this.#overrunError) {
      value |= LSR.OE;
      this.#overrunError = false;
      this.#update();
    }
    return value;
  }

  #modemStatus(): number {
    const value = this.#modemLines | this.#modemDeltas;
    if (this.#modemDeltas) {
      this.#modemDeltas = 0;
      this.#update();
    }
    return value;
  }

  #polled(): void {
    if (this.#polls < POLLING) this.#polls++;
    else this.#pump();
  }

  /** Moves input into an empty receiver if the guest has use for it. */
  #pump(): void {
    if (this.#rx.length > 0 || this.#mcr & MCR.LOOP) return;
    if (this.#rtsSeen && (this.#mcr & MCR.RTS) === 0) return;
    if ((this.#ier & IER.RDI) === 0 && this.#polls < POLLING) return;
    if (this.#input.fill(this.#rx, this.#capacity)) this.#update();
  }

  /** The pending interrupt of the highest priority (table IV). */
  #source(): number {
    const ier = this.#ier;
    if (this.#overrunError && ier & IER.RLSI) return IIR.RLSI;
    if (this.#rx.length > 0 && ier & IER.RDI) {
      const trigger = this.#fcr & FCR.ENABLE ? (RX_TRIGGER[this.#fcr >> 6] as number) : 1;
      return this.#rx.length >= trigger ? IIR.RDI : IIR.RX_TIMEOUT;
    }
    if (this.#threPending && ier & IER.THRI) return IIR.THRI;
    if (this.#modemDeltas && ier & IER.MSI) return IIR.MSI;
    return IIR.NO_INT;
  }

  /**
   * PCs gate the interrupt with OUT2. The MCR bit counts, not the pin, which loopback forces inactive: so do the chips
   * that followed, and interrupts can be tested in loopback.
   */
  #update(): void {
    const level = (this.#mcr & MCR.OUT2) !== 0 && this.#source() !== IIR.NO_INT;
    if (level === this.#level) return;
    this.#level = level;
    this.#interrupt.set(level);
  }
}
