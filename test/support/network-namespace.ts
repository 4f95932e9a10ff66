import { execFileSync } from 'node:child_process';
import koffi from 'koffi';

const CLONE_NEWNET = 0x4000_0000;
let entered = false;

/**
 * Gives this process a network namespace of its own, with nothing but a loopback interface: for tests that make
 * interfaces. Child processes and threads made from now on are in it too; it is gone with the last of them. Needs root,
 * or CAP_SYS_ADMIN.
 */
export function enterNetworkNamespace(): void {
  if (entered) return;
  const unshare = koffi.load('libc.so.6').func('int unshare(int flags)');
  if (unshare(CLONE_NEWNET) !== 0) throw new Error('no network namespace: these tests need root');
  entered = true;
  ip('link set lo up');
}

/** `ip ARGUMENTS`. @returns what it printed. */
export function ip(args: string): string {
  return execFileSync('ip', args.split(' '), { encoding: 'utf8' });
}
