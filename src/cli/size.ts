import { UsageError } from '../errors.js';

const UNITS: Readonly<Record<string, number>> = { K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

/** Bytes from `64M`, `1.5G`, `512KiB`; a bare number is MiB, as in QEMU. @throws UsageError naming the option. */
export function parseSize(option: string, text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:iB|B)?|B)?$/i.exec(text.trim());
  if (!match) throw new UsageError(`--${option}: '${text}' is not a size; write for example 64M or 1G`);
  const unit = match[2]?.toUpperCase();
  const scale = unit ? (UNITS[unit] as number) : /B$/i.test(text) ? 1 : (UNITS.M as number);
  return Math.floor(Number(match[1]) * scale);
}

/** `64M` for 67108864; to one place after the point. */
export function formatSize(bytes: number): string {
  const unit = bytes >= 2 ** 30 ? 'G' : bytes >= 2 ** 20 ? 'M' : 'K';
  return `${Number((bytes / (UNITS[unit] as number)).toFixed(1))}${unit}`;
}
