import { expect } from 'vitest';
import { SnapshotError } from '#dist/errors.js';
import { StateReader } from '#dist/state-reader.js';

type Json = null | boolean | number | string | Json[] | { [name: string]: Json };

/** Of every kind one; a number or a text that no field of a state may have. */
const WRONG: readonly Json[] = [null, true, -(2 ** 65), 1.5, 2 ** 65, '!', [], [[]], {}];

/**
 * Every field of a state is left out, then is of another type or out of range: each time restore() must throw a
 * SnapshotError that names it. @param make what is restored, as after power-on.
 */
export function expectDamageIsRefused(saved: object, make: () => { restore?(state: StateReader): void }): void {
  const whole = JSON.parse(JSON.stringify(saved)) as Json;
  make().restore?.(new StateReader(whole, 'state'));
  const paths = [...fields(whole, [])];
  expect(paths.length).toBeGreaterThan(0);
  for (const path of paths) {
    const name = path.filter((step) => typeof step === 'string').at(-1) as string;
    for (const value of [undefined, ...WRONG]) {
      const state = structuredClone(whole);
      if (!damage(state, path, value)) continue;
      const label = `state.${path.join('.')} = ${JSON.stringify(value)}`;
      let thrown: unknown;
      try {
        make().restore?.(new StateReader(state, 'state'));
      } catch (error) {
        thrown = error;
      }
      expect(thrown, label).toBeInstanceOf(SnapshotError);
      expect((thrown as Error).message, label).toContain(name);
    }
  }
}

function* fields(value: Json, path: (string | number)[]): Iterable<(string | number)[]> {
  if (typeof value !== 'object' || value === null) return;
  for (const [name, field] of Object.entries(value)) {
    const here = [...path, Array.isArray(value) ? Number(name) : name];
    yield here;
    yield* fields(field, here);
  }
}

/** @returns false where that is no damage. */
function damage(state: Json, path: readonly (string | number)[], value: Json | undefined): boolean {
  const name = path.at(-1) as string | number;
  let owner = state as Record<string | number, Json>;
  for (const step of path.slice(0, -1)) owner = owner[step] as Record<string | number, Json>;
  const before = owner[name];
  if (value === undefined) {
    if (Array.isArray(owner)) return false; // a shorter list may be one
    delete owner[name];
    return true;
  }
  const kind = (one: unknown) => (Array.isArray(one) ? 'list' : one === null ? 'null' : typeof one);
  const mayBe = kind(value) === kind(before) && !(kind(value) === 'number' || kind(value) === 'string');
  if (mayBe) return false;
  owner[name] = value;
  return true;
}
