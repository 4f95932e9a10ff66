import { createRequire } from 'node:module';

/** Of this package, as `0.1.0`. */
export function packageVersion(): string {
  return createRequire(import.meta.url)('tsvisor/package.json').version;
}
