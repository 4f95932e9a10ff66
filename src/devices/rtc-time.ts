/**
 * The time registers of the MC146818 real-time clock (Motorola MC146818 datasheet, table 3: time, calendar and alarm data
 * modes), with the century byte where PCs keep it.
 */
export const TIME = {
  SECONDS: 0x00,
  MINUTES: 0x02,
  HOURS: 0x04,
  DAY_OF_WEEK: 0x06,
  DAY: 0x07,
  MONTH: 0x08,
  YEAR: 0x09,
  CENTURY: 0x32,
} as const;

const timeRegisters: ReadonlySet<number> = new Set(Object.values(TIME));

/** Whether a register is one that the running clock writes. */
export function isTimeRegister(index: number): boolean {
  return timeRegisters.has(index);
}

/** Register B: binary rather than BCD, and 24 rather than 12 hours. */
const BINARY = 0x04;
const HOURS_24 = 0x02;

/** Bit 7 of a 12-hour hour. */
const PM = 0x80;

/** Writes a time (milliseconds since 1970, UTC) into the registers, in the format that register B asks for. */
export function encodeTime(time: number, format: number, registers: Uint8Array): void {
  const encode = (value: number) => (format & BINARY ? value : Math.trunc(value / 10) * 16 + (value % 10));
  const date = new Date(time);
  const hour = date.getUTCHours();
  const year = Math.max(0, date.getUTCFullYear());
  registers[TIME.SECONDS] = encode(date.getUTCSeconds());
  registers[TIME.MINUTES] = encode(date.getUTCMinutes());
  registers[TIME.HOURS] = format & HOURS_24 ? encode(hour) : encode(hour % 12 || 12) | (hour >= 12 ? PM : 0);
  registers[TIME.DAY_OF_WEEK] = encode(date.getUTCDay() + 1);
  registers[TIME.DAY] = encode(date.getUTCDate());
  registers[TIME.MONTH] = encode(date.getUTCMonth() + 1);
  registers[TIME.YEAR] = encode(year % 100);
  registers[TIME.CENTURY] = encode(Math.trunc(year / 100));
}

/** The reverse, to the whole second. Any register values give some time; the day of the week does not count. */
export function decodeTime(format: number, registers: Uint8Array): number {
  const decode = (value: number) => (format & BINARY ? value : (value >> 4) * 10 + (value & 0x0f));
  const at = (index: number) => decode(registers[index] as number);
  const rawHour = registers[TIME.HOURS] as number;
  const hour = format & HOURS_24 ? decode(rawHour) : (decode(rawHour & ~PM) % 12) + (rawHour & PM ? 12 : 0);
  const date = new Date(0);
  date.setUTCFullYear(at(TIME.CENTURY) * 100 + at(TIME.YEAR), at(TIME.MONTH) - 1, at(TIME.DAY));
  date.setUTCHours(hour, at(TIME.MINUTES), at(TIME.SECONDS));
  return date.getTime();
}
