import { once } from 'node:events';
import { CLOSED_STDOUT_EXIT } from './exit-codes.js';

/** Writes to stdout and waits while its reader is slow. Ends the process when that reader is gone. */
export async function writeAll(chunk: Uint8Array): Promise<void> {
  const { stdout } = process;
  if (stdout.destroyed || stdout.errored) process.exit(CLOSED_STDOUT_EXIT);
  if (stdout.write(chunk)) return;
  await Promise.race([once(stdout, 'drain'), once(stdout, 'close')]).catch(() => {});
  if (stdout.destroyed || stdout.errored) process.exit(CLOSED_STDOUT_EXIT);
}
