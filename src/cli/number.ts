import { UsageError } from '../errors.js';

/**
 * A number that an option gives. Such options are text to yargs, which adds numbers up that are given twice.
 * @throws UsageError naming the option.
 */
export function parseNumber(option: string, text: string, what: string, min: number, max: number): number {
  const value = /^[+-]?(\d+\.?\d*|\.\d+)$/.test(text.trim()) ? Number(text) : Number.NaN;
  if (value >= min && value <= max) return value;
  throw new UsageError(`--${option}: ${text} is not ${what}`);
}

/** Seconds above 0, in milliseconds; as many as a timer of Node takes. @throws UsageError naming the option. */
export function parseSeconds(option: string, text: string): number {
  return parseNumber(option, text, 'a number of seconds above 0', 0.001, 2_000_000) * 1e3;
}
