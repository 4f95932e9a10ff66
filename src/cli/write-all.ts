import { once } from 'node:events';

/** Writes to stdout and waits while its reader is slow. @returns whether it goes on; main() tells why not. */
export async function writeAll(chunk: Uint8Array): Promise<boolean> {
  const { stdout } = process;
  if (!stdout.destroyed && !stdout.errored && !stdout.write(chunk)) {
    await Promise.race([once(stdout, 'drain'), once(stdout, 'close')]).catch(() => {});
  }
  return !stdout.destroyed && !stdout.errored;
}
