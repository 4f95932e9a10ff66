import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { expect } from 'vitest';

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

type Held = Pick<Resources, 'descriptors' | 'threads'>;

/**
 * Waits until the process holds no more than that: the kernel counts a thread for a moment after it was joined, and Node
 * closes sockets in its own time. What leaks is still there in the end.
 */
export async function expectNoMoreThan(before: Held, held: () => Held = resources): Promise<void> {
  await expect.poll(() => held().threads, { timeout: 20_000 }).toBeLessThanOrEqual(before.threads);
  await expect.poll(() => held().descriptors, { timeout: 20_000 }).toBeLessThanOrEqual(before.descriptors);
}

/** Threads, and descriptors but for TCP sockets: the connections of a guest that runs come and go. */
export function lasting(): Held {
  const tables = ['tcp', 'tcp6'].map((name) => readFileSync(`/proc/self/net/${name}`, 'latin1'));
  const tcp = new Set(tables.flatMap((table) => table.split('\n').map((line) => line.trim().split(/\s+/)[9])));
  const isTcp = (fd: string) => {
    try {
      return tcp.has(/^socket:\[(\d+)\]$/.exec(readlinkSync(`/proc/self/fd/${fd}`))?.[1] ?? '');
    } catch {
      return true; // that of the folder itself
    }
  };
  return { threads: resources().threads, descriptors: readdirSync('/proc/self/fd').filter((fd) => !isTcp(fd)).length };
}
