/**
 * Registers and bits of the National Semiconductor PC16550D, "Universal Asynchronous Receiver/Transmitter with FIFOs",
 * June 1995, section 8 (tables I to IV). The names are those of Linux's include/uapi/linux/serial_reg.h.
 */

/** Register offsets. */
export const UART = {
  /** Receiver buffer (read), transmitter holding (write), divisor latch low byte (DLAB). */
  DATA: 0,
  /** Interrupt enable; divisor latch high byte (DLAB). */
  IER: 1,
  /** Interrupt identification (read), FIFO control (write). */
  IIR_FCR: 2,
  LCR: 3,
  MCR: 4,
  LSR: 5,
  MSR: 6,
  SCR: 7,
} as const;

/** Interrupt enable register. */
export const IER = { RDI: 0x01, THRI: 0x02, RLSI: 0x04, MSI: 0x08, ALL: 0x0f } as const;

/** Interrupt identification register: bits 3..0 of table IV, and the two FIFO bits. */
export const IIR = {
  NO_INT: 0x01,
  RLSI: 0x06,
  RDI: 0x04,
  RX_TIMEOUT: 0x0c,
  THRI: 0x02,
  MSI: 0x00,
  FIFO_ENABLED: 0xc0,
} as const;

/** FIFO control register. */
export const FCR = { ENABLE: 0x01, CLEAR_RX: 0x02, CLEAR_TX: 0x04, DMA: 0x08, TRIGGER: 0xc0 } as const;

/** Receiver FIFO trigger levels by FCR bits 7..6. */
export const RX_TRIGGER = [1, 4, 8, 14] as const;

/** Line control register: divisor latch access. */
export const LCR_DLAB = 0x80;

/** Modem control register. */
export const MCR = { DTR: 0x01, RTS: 0x02, OUT1: 0x04, OUT2: 0x08, LOOP: 0x10, ALL: 0x1f } as const;

/** Line status register. */
export const LSR = { DR: 0x01, OE: 0x02, THRE: 0x20, TEMT: 0x40 } as const;

/** Modem status register. */
export const MSR = {
  DCTS: 0x01,
  DDSR: 0x02,
  TERI: 0x04,
  DDCD: 0x08,
  CTS: 0x10,
  DSR: 0x20,
  RI: 0x40,
  DCD: 0x80,
} as const;
