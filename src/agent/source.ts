import { UsageError } from '../errors.js';

/** Bytes for the guest may be text, a Uint8Array or an iterable of such. @param what names it in the UsageError. */
export function checkSource(value: unknown, what: string): void {
  if (typeof value === 'string') return;
  if (typeof value !== 'object' || value === null || !(Symbol.asyncIterator in value || Symbol.iterator in value)) {
    throw new UsageError(`${what}: must be text, a Uint8Array, or a stream or other iterable of such`);
  }
}
