import { readFileSync, readlinkSync } from 'node:fs';
import type { StateReader } from '../state-reader.js';

/** Which process something is, on this host or another. */
export interface ProcessIdentity {
  /** Of the host, since it was booted. */
  readonly boot: string;
  /** The namespace that the number is of. */
  readonly namespace: string;
  readonly pid: number;
  /** Clock ticks from boot to its start. */
  readonly started: number;
}

export function ownIdentity(): ProcessIdentity {
  return { ...place(), pid: process.pid, started: statOf('self')?.started ?? 0 };
}

/** Reads what another process says it is. */
export function readIdentity(reader: StateReader): ProcessIdentity {
  return {
    boot: reader.text('boot', 64),
    namespace: reader.text('namespace', 64),
    pid: reader.number('pid', 1, 2 ** 31),
    started: reader.number('started', 0, Number.MAX_SAFE_INTEGER),
  };
}

/** Whether a process is there; undefined when it is of another host, or out of sight. */
export function isAlive(identity: ProcessIdentity): boolean | undefined {
  const { boot, namespace } = place();
  if (boot === '' || boot !== identity.boot || namespace !== identity.namespace) return undefined;
  const stat = statOf(String(identity.pid));
  return stat !== undefined && stat.started === identity.started && !'ZX'.includes(stat.state);
}

function place(): { boot: string; namespace: string } {
  try {
    const boot = readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim();
    return { boot, namespace: readlinkSync('/proc/self/ns/pid') };
  } catch {
    return { boot: '', namespace: '' };
  }
}

/** Of proc(5): its third field, and its 22nd. The second may hold anything, up to the last parenthesis. */
function statOf(pid: string): { state: string; started: number } | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1');
    const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
    return { state: fields[0] ?? 'X', started: Number(fields[19]) };
  } catch {
    return undefined;
  }
}
