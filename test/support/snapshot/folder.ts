import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeState, type SnapshotState } from '#dist/snapshot/format.js';

/** A value of JSON, for tests that change what is in it. */
// biome-ignore lint/suspicious/noExplicitAny: it is anybody's
export type Json = any;

export const MEMORY = 2 * 2 ** 20;

/** A state of a machine that never was. */
export function anyState(changes: Partial<SnapshotState> = {}): SnapshotState {
  return {
    id: '0123456789abcdef0123456789abcdef',
    created: '2026-01-01T00:00:00.000Z',
    host: { cpu: 'a CPU', kernel: '6.18', tsvisor: '1.0.0' },
    config: { memory: MEMORY, drives: [], networks: [], devices: [] },
    disks: [],
    memory: { size: MEMORY },
    machine: { console: '', clock: '0', vcpus: [], irqchips: [], pit: '', devices: { ports: {}, mmio: {} } },
    ...changes,
  };
}

/** A state file whose checksum is right, whatever it holds. */
export function sealed(body: string | Uint8Array, version = 1): Buffer {
  const checksum = createHash('sha256').update(body).digest('hex');
  return Buffer.concat([Buffer.from(`tsvisor-snapshot ${version} ${checksum}\n`), Buffer.from(body)]);
}

/** Makes a snapshot's folder. @returns it */
export function writeFolder(folder: string, state: SnapshotState | Buffer, memory = MEMORY): string {
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'state'), Buffer.isBuffer(state) ? state : encodeState(state), { mode: 0o600 });
  writeFileSync(join(folder, 'memory'), '', { mode: 0o600 });
  truncateSync(join(folder, 'memory'), memory);
  return folder;
}

/** What is in the state file of a folder. */
export function stateIn(folder: string): Json {
  const bytes = readFileSync(join(folder, 'state'));
  return JSON.parse(bytes.subarray(bytes.indexOf('\n') + 1).toString());
}

/** Changes the state of a folder and makes its checksum right again. */
export function changeState(folder: string, change: (state: Json) => void): void {
  const state = stateIn(folder);
  change(state);
  writeFileSync(join(folder, 'state'), sealed(JSON.stringify(state)));
}

/** A change of one field, by its path as `machine.vcpus.0.regs`, and its name. */
export function set(path: string, value: unknown): [name: string, change: (state: Json) => void] {
  return [
    `${path} is ${JSON.stringify(value)?.slice(0, 30)}`,
    (state) => {
      const names = path.split('.');
      const last = names.pop() as string;
      names.reduce((at, name) => at[name], state)[last] = value;
    },
  ];
}

/** The checksum that a folder's state has. */
export function checksumOf(folder: string): string {
  return readFileSync(join(folder, 'state'), 'latin1').split(' ', 3)[2]?.slice(0, 64) as string;
}

/** The error that a promise is rejected with. */
export async function failureOf(promise: Promise<unknown>): Promise<{ code: string; message: string }> {
  try {
    await promise;
  } catch (error) {
    const { code, message } = error as { code: string; message: string };
    return { code, message };
  }
  throw new Error('it did not fail');
}
