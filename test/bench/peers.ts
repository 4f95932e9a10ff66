import { type ChildProcessByStdio, spawn } from 'node:child_process';
import { accessSync, constants, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { now } from '#dist/machine/end.js';
import { QEMU, qemuArguments } from './contestants.js';

/** A guest for every VMM: one vCPU, and the first serial port for a console. */
export interface PeerGuest {
  readonly kernel: string;
  readonly initrd?: string;
  readonly append: string;
  /** MiB. */
  readonly memory: number;
}

/** Longer than a boot where KVM interprets the guest's kernel. */
const PROMPT_TIMEOUT = 120_000;
/** QEMU stops the guest on these and waits for somebody to look. */
const HOPELESS = /KVM internal error.*|error: kvm run failed.*/;
/** kvmtool has had each of them. */
const KVMTOOL = ['lkvm', 'kvmtool', 'vm'];

/** VMMs that may be on this host, each with how it runs a guest until that prints `prompt`. @returns milliseconds. */
export function peersUntil(prompt: RegExp, guest: PeerGuest) {
  return {
    qemu: () => timeUntil(prompt, QEMU, qemuBoots(guest)),
    kvmtool: () => timeUntil(prompt, installed(KVMTOOL), kvmtoolBoots(guest)),
    firecracker: async () => {
      const folder = mkdtempSync(join(tmpdir(), 'tsvisor-bench-'));
      try {
        const config = join(folder, 'machine.json');
        writeFileSync(config, JSON.stringify(firecrackerConfig(guest)));
        return await timeUntil(prompt, installed(['firecracker']), ['--no-api', '--config-file', config]);
      } finally {
        rmSync(folder, { recursive: true });
      }
    },
  };
}

/** @returns the first of these programs that is on PATH. @throws Error */
function installed(names: readonly string[]): string {
  const folders = (process.env.PATH ?? '').split(delimiter).filter((folder) => folder !== '');
  for (const name of names) {
    for (const folder of folders) {
      try {
        const path = join(folder, name);
        accessSync(path, constants.X_OK);
        return path;
      } catch {
        // the next one
      }
    }
  }
  throw new Error('it is not installed');
}

function qemuBoots({ kernel, initrd, append, memory }: PeerGuest): string[] {
  const image = initrd === undefined ? [] : ['-initrd', initrd];
  return [...qemuArguments(kernel, memory, true, true), ...image, '-append', append, '-serial', 'stdio'];
}

function kvmtoolBoots({ kernel, initrd, append, memory }: PeerGuest): string[] {
  const image = initrd === undefined ? [] : ['--initrd', initrd];
  const machine = ['--cpus', '1', '--mem', `${memory}`, '--console', 'serial', '--network', 'mode=none'];
  return ['run', ...machine, '--kernel', kernel, ...image, '--params', append];
}

/** What Firecracker's API takes; PCI is not there to be looked for. */
function firecrackerConfig({ kernel, initrd, append, memory }: PeerGuest): object {
  const image = initrd === undefined ? {} : { initrd_path: initrd };
  return {
    'boot-source': { kernel_image_path: kernel, boot_args: append, ...image },
    'machine-config': { vcpu_count: 1, mem_size_mib: memory },
    drives: [],
  };
}

/** Runs a program until it prints something, and ends it. @returns milliseconds. @throws Error with what it says instead. */
export async function timeUntil(prompt: RegExp, program: string, args: readonly string[]): Promise<number> {
  const start = now();
  const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'] });
  try {
    return (await untilPrinted(prompt, child)) - start;
  } finally {
    child.kill('SIGKILL');
  }
}

function untilPrinted(prompt: RegExp, child: ChildProcessByStdio<Writable, Readable, Readable>): Promise<number> {
  return new Promise((resolve, reject) => {
    let output = '';
    let errors = '';
    const fail = (why: string) => {
      clearTimeout(timer);
      reject(new Error(why));
    };
    const timer = setTimeout(() => fail(`its guest says nothing for ${PROMPT_TIMEOUT / 1e3} s`), PROMPT_TIMEOUT);
    child.stdout.setEncoding('utf8').on('data', (text) => {
      output += text;
      if (!prompt.test(output)) return;
      clearTimeout(timer);
      resolve(now());
    });
    child.stderr.setEncoding('utf8').on('data', (text) => {
      errors += text;
      const why = HOPELESS.exec(errors)?.[0];
      if (why !== undefined) fail(why);
    });
    child.on('error', ({ message }) => fail(message));
    child.on('close', (code, signal) => {
      const said = (errors.trim() || output.trim()).split('\n')[0];
      fail(said || `it ends with ${signal ?? `code ${code}`}`);
    });
  });
}
