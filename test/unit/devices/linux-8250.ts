import type { SerialRig } from './serial-rig.js';

/** Register offsets, as in include/uapi/linux/serial_reg.h. */
const [RX, TX, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR] = [0, 0, 1, 2, 2, 3, 4, 5, 6, 7];

export type PortType =
  | 'unknown'
  | '8250'
  | '16450'
  | '16550'
  | '16550A'
  | '16650'
  | '16750'
  | 'NS16550A'
  | 'XScale'
  | 'U6';

/** What things cost the guest, in microseconds. */
export interface Costs {
  /** A port access. */
  readonly access: number;
  /** Reading a character in the interrupt handler, without its accesses. */
  readonly receive: number;
  /** Entering and leaving the interrupt handler. */
  readonly interrupt: number;
  /** Waking the worker and the program that reads. */
  readonly wakeUp: number;
  /** A character's way through line discipline, the program that reads it, and back to the transmit buffer. */
  readonly consume: number;
}

/** Nested KVM without hardware virtualization: port accesses of 13 µs, a kernel instruction of 1 µs. */
export const nestedHost: Costs = { access: 13, receive: 80, interrupt: 400, wakeUp: 2000, consume: 250 };
/** KVM on hardware. */
export const plainHost: Costs = { access: 2, receive: 0.2, interrupt: 5, wakeUp: 10, consume: 1 };

/** The limit of a tty's flip buffer (drivers/tty/tty_buffer.c, TTYB_DEFAULT_MEM_LIMIT), and of the transmit buffer. */
const FLIP_LIMIT = 65_536;
const TX_LIMIT = 4096;
/** What the reader takes at a time. */
const CHUNK = 64;

/**
 * What Linux 6.1's 8250 driver does with a port (drivers/tty/serial/8250/8250_port.c), as far as the device can tell, and
 * a tty on it whose reader echoes everything. One processor: nothing else runs during the interrupt handler.
 */
export class Linux8250 {
  readonly #rig: SerialRig;
  readonly #costs: Costs;
  #ier = 0;
  #mcr = 0;
  /** Rising edges of the line that were taken as interrupts: the IOAPIC pin of IRQ 4 is edge-triggered. */
  #taken = 0;
  readonly bugs: string[] = [];
  readonly flip: number[] = [];
  readonly received: number[] = [];
  readonly #xmit: number[] = [];
  flipOverruns = 0;
  flipHighWater = 0;
  lineOverruns = 0;
  interrupts = 0;
  longestInterrupt = 0;
  /** Whether the reader writes everything back. */
  echo = true;
  /** Drop RTS while more than this waits in the flip buffer, as with CRTSCTS; raise it when that has halved. */
  throttleAt = Number.POSITIVE_INFINITY;

  constructor(rig: SerialRig, costs: Costs) {
    this.#rig = rig;
    this.#costs = costs;
  }

  get idle(): boolean {
    return this.flip.length === 0 && this.#xmit.length === 0;
  }

  #in(register: number): number {
    this.#rig.advance(this.#costs.access);
    return this.#rig.read(register);
  }

  #out(register: number, value: number): void {
    this.#rig.advance(this.#costs.access);
    this.#rig.write(register, value);
  }

  /** autoconfig() with CONFIG_SERIAL_8250_16550A_VARIANTS, without UPF_SKIP_TEST. */
  autoconfig(): PortType {
    const ier = this.#in(IER);
    this.#out(IER, 0);
    const off = this.#in(IER) & 0x0f;
    this.#out(IER, 0x0f);
    const on = this.#in(IER) & 0x0f;
    this.#out(IER, ier);
    if (off !== 0 || on !== 0x0f) return 'unknown';

    const mcr = this.#in(MCR);
    const lcr = this.#in(LCR);
    this.#out(MCR, 0x1a);
    const loop = this.#in(MSR) & 0xf0;
    this.#out(MCR, mcr);
    if (loop !== 0x90) return 'unknown';

    this.#out(LCR, 0xbf);
    this.#out(FCR, 0); // EFR of others
    this.#out(LCR, 0);
    this.#out(FCR, 1);
    const type = this.#typeBy(this.#in(IIR) >> 6);
    this.#out(LCR, lcr);
    this.#out(MCR, mcr);
    this.#clearFifos();
    this.#in(RX);
    this.#out(IER, 0);
    return type;
  }

  #typeBy(fifoBits: number): PortType {
    if (fifoBits === 1) return 'unknown';
    if (fifoBits === 2) return '16550';
    return fifoBits === 3 ? this.#variant() : this.#early();
  }

  #early(): PortType {
    const scratch = this.#in(SCR);
    const kept = [0xa5, 0x5a].every((value) => {
      this.#out(SCR, value);
      return this.#in(SCR) === value;
    });
    this.#out(SCR, scratch);
    return kept ? '16450' : '8250';
  }

  #variant(): PortType {
    for (const mode of [0x80, 0xbf]) {
      this.#out(LCR, mode);
      if (this.#in(IIR) === 0) return '16650'; // it has an EFR
    }
    this.#out(LCR, 0);
    const mcr = this.#in(MCR);
    this.#out(LCR, 0xe0);
    const exchanged = this.#in(2);
    if (((exchanged ^ mcr) & 0x10) === 0) {
      this.#out(LCR, 0);
      this.#out(MCR, mcr ^ 0x10);
      this.#out(LCR, 0xe0);
      const again = this.#in(2);
      this.#out(LCR, 0);
      this.#out(MCR, mcr);
      if ((again ^ mcr) & 0x10) return 'NS16550A';
    }
    this.#out(LCR, 0);
    this.#out(FCR, 0x21);
    const plain = this.#in(IIR) >> 5;
    this.#out(FCR, 1);
    this.#out(LCR, 0x80);
    this.#out(FCR, 0x21);
    const latched = this.#in(IIR) >> 5;
    this.#out(FCR, 1);
    this.#out(LCR, 0);
    if (plain === 6 && latched === 7) return '16750';

    const ier = this.#in(IER);
    this.#out(IER, ier & ~0x40);
    if ((this.#in(IER) & 0x40) === 0) {
      this.#out(IER, ier | 0x40);
      if (this.#in(IER) & 0x40) return 'XScale';
    }
    this.#out(IER, ier);
    return this.sizeFifo() === 64 ? 'U6' : '16550A';
  }

  /** size_fifo(): counts what comes back in loopback. */
  sizeFifo(): number {
    const [lcr, mcr] = [this.#in(LCR), this.#in(MCR)];
    this.#out(LCR, 0);
    this.#out(FCR, 0x07);
    this.#out(MCR, 0x10);
    const divisor = this.#divisor(1);
    this.#out(LCR, 3);
    for (let i = 0; i < 256; i++) this.#out(TX, i);
    this.#rig.advance(20_000);
    let count = 0;
    while (this.#in(LSR) & 1 && count < 256) {
      this.#in(RX);
      count++;
    }
    this.#out(FCR, 0);
    this.#out(MCR, mcr);
    this.#divisor(divisor);
    this.#out(LCR, lcr);
    return count;
  }

  #divisor(value: number): number {
    this.#out(LCR, 0x80);
    const before = this.#in(0) | (this.#in(1) << 8);
    this.#out(0, value & 0xff);
    this.#out(1, value >> 8);
    return before;
  }

  #clearFifos(): void {
    this.#out(FCR, 0x01);
    this.#out(FCR, 0x07);
    this.#out(FCR, 0x00);
  }

  /** serial8250_do_startup(), then uart_change_speed: what opening a tty does. */
  open(): void {
    this.#clearFifos();
    this.#clearInterrupts();
    if (this.#in(LSR) === 0xff) this.bugs.push('LSR safety check');
    // What request_irq costs.
    this.#rig.advance(this.#costs.interrupt * 10);
    this.#waitFor(0x20);
    this.#out(IER, 2);
    const first = this.#in(IIR);
    this.#out(IER, 0);
    this.#out(IER, 2);
    const second = this.#in(IIR);
    this.#out(IER, 0);
    if ((first & 1) === 0 && second & 1) this.bugs.push('THRE');
    this.#out(LCR, 3);
    this.#mcr = 0x08;
    this.#out(MCR, this.#mcr);
    this.#out(IER, 2);
    const lsr = this.#in(LSR);
    const iir = this.#in(IIR);
    this.#out(IER, 0);
    if (lsr & 0x40 && iir & 1) this.bugs.push('TXEN');
    this.#clearInterrupts();
    this.#ier = 0x05;
    this.setTermios();
    this.#mcr |= 0x03;
    this.#out(MCR, this.#mcr);
  }

  /** serial8250_do_set_termios(). */
  setTermios(): void {
    this.#out(IER, this.#ier);
    this.#divisor(1);
    this.#out(LCR, 3);
    this.#out(FCR, 0x01);
    this.#out(FCR, 0x87);
    this.#out(MCR, this.#mcr);
  }

  /** serial8250_do_shutdown(). */
  close(): void {
    this.#ier = 0;
    this.#out(IER, 0);
    this.#mcr = 0;
    this.#out(MCR, 0);
    this.#out(LCR, this.#in(LCR) & ~0x40);
    this.#clearFifos();
    this.#in(RX);
  }

  #clearInterrupts(): void {
    for (const register of [LSR, RX, IIR, MSR]) this.#in(register);
  }

  #waitFor(bits: number): boolean {
    for (let i = 0; i < 10_000; i++) {
      if ((this.#in(LSR) & bits) === bits) return true;
      this.#rig.advance(1);
    }
    return false;
  }

  /** serial8250_console_write() without FIFO: polled, with interrupts off. */
  printk(text: string): void {
    const ier = this.#in(IER);
    this.#out(IER, 0);
    for (const byte of Buffer.from(text)) {
      this.#waitFor(0x20);
      this.#out(TX, byte);
    }
    this.#waitFor(0x60);
    this.#out(IER, ier);
  }

  /** A write to the tty, as far as it fits: serial8250_start_tx. @returns how many bytes were taken. */
  write(bytes: readonly number[]): number {
    const taken = bytes.slice(0, TX_LIMIT - this.#xmit.length);
    this.#xmit.push(...taken);
    if (this.#xmit.length > 0 && (this.#ier & 2) === 0) {
      this.#ier |= 2;
      this.#out(IER, this.#ier);
    }
    return taken.length;
  }

  /** serial8250_interrupt(): until IIR says that nothing is pending. */
  interrupt(): void {
    const start = this.#rig.time;
    this.interrupts++;
    this.#taken = this.#rig.rises;
    this.#rig.advance(this.#costs.interrupt);
    for (let pass = 0; pass < 512; pass++) {
      if (this.#in(IIR) & 1) break;
      let lsr = this.#in(LSR);
      if (lsr & 1) lsr = this.#receive(lsr);
      this.#in(MSR);
      if (lsr & 0x20 && this.#ier & 2) this.#send();
    }
    this.longestInterrupt = Math.max(this.longestInterrupt, this.#rig.time - start);
  }

  #receive(first: number): number {
    let lsr = first;
    for (let count = 0; count < 256 && lsr & 1; count++) {
      const byte = this.#in(RX);
      if (lsr & 2) this.lineOverruns++;
      this.#rig.advance(this.#costs.receive);
      if (this.flip.length < FLIP_LIMIT) this.flip.push(byte);
      else this.flipOverruns++;
      this.flipHighWater = Math.max(this.flipHighWater, this.flip.length);
      lsr = this.#in(LSR);
    }
    return lsr;
  }

  #send(): void {
    for (const byte of this.#xmit.splice(0, 16)) this.#out(TX, byte);
    if (this.#xmit.length > 0) return;
    this.#ier &= ~2;
    this.#out(IER, this.#ier);
  }

  /**
   * Runs what there is to run outside of the interrupt handler: the worker that empties the flip buffer, and the program
   * that reads; a chunk at a time, as far as its echo fits the transmit buffer.
   */
  step(): void {
    this.#throttle();
    const chunk = this.flip.slice(0, this.echo ? Math.min(CHUNK, TX_LIMIT - this.#xmit.length) : CHUNK);
    this.flip.splice(0, chunk.length);
    this.received.push(...chunk);
    this.#rig.advance(this.#costs.wakeUp);
    // The interrupt handler comes between: the cost is paid in pieces.
    for (let i = 0; i < chunk.length; i++) {
      this.#rig.advance(this.#costs.consume);
      if (this.#rig.rises > this.#taken) this.interrupt();
      this.#throttle();
    }
    if (this.echo) this.write(chunk);
  }

  #throttle(): void {
    const throttled = (this.#mcr & 2) === 0;
    if (throttled ? this.flip.length > this.throttleAt / 2 : this.flip.length <= this.throttleAt) return;
    this.#mcr ^= 2;
    this.#out(MCR, this.#mcr);
  }

  /** Runs the machine until `done`, or for too long. */
  run(done: () => boolean, limit = 5_000_000): void {
    for (let i = 0; i < limit; i++) {
      if (done()) return;
      if (this.#rig.rises > this.#taken) this.interrupt();
      else this.step();
    }
    throw new Error('the guest does not get there');
  }
}
