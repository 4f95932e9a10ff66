import { UsageError } from '../errors.js';

/** The names of T's fields, for the compiler to check: each of them, no other. */
export type FieldsOf<T> = Readonly<Record<T extends unknown ? keyof T : never, true>>;

/**
 * A misspelt field would else do nothing, and `readonly` for `readOnly` harm.
 * @param where of the configuration it is, as `drives[0]`; empty at the top.
 * @throws UsageError unless `value` is an object of those fields only.
 */
export function checkFields(value: unknown, where: string, known: Readonly<Record<string, true>>): void {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new UsageError(`${where || 'config'}: must be an object`);
  }
  for (const name of Object.keys(value)) {
    if (Object.hasOwn(known, name)) continue;
    const all = Object.keys(known).join(', ');
    throw new UsageError(`${where && `${where}.`}${name}: there is no such field; there are ${all}`);
  }
}

/** @throws UsageError */
export function checkList(value: unknown, where: string): void {
  if (!Array.isArray(value)) throw new UsageError(`${where}: must be an array`);
}
