import { readdirSync, readFileSync } from 'node:fs';

/** What this process holds: for tests that must leave it as it was. */
export interface Resources {
  readonly descriptors: number;
  readonly threads: number;
  readonly mappings: number;
  readonly rssBytes: number;
}

export function resources(): Resources {
  const status = readFileSync('/proc/self/status', 'latin1');
  const field = (name: string) => Number(new RegExp(`^${name}:\\s*(\\d+)`, 'm').exec(status)?.[1]);
  return {
    descriptors: readdirSync('/proc/self/fd').length,
    threads: field('Threads'),
    mappings: readFileSync('/proc/self/maps', 'latin1').split('\n').length,
    rssBytes: field('VmRSS') * 1024,
  };
}
