import { readFileSync } from 'node:fs';

/** Where the agent is in the initramfs; the kernel runs it first, and it becomes the image's own init. */
export const AGENT_PATH = '/.tsvisor-agent';

/** Has the default guest's init start the agent of its own image. */
export const AGENT_SERVICE_WORD = 'tsvisor.agent';

/**
 * An initramfs archive (newc cpio, the kernel's buffer-format.rst) with just the agent, a multiple of 4 bytes long: what
 * follows it in the initrd, packed or not, is unpacked too. Before the image's own initrd and not after it, where the
 * kernel looks for a boot configuration.
 * @param binary path of the agent's program
 */
export function agentArchive(binary: string): Buffer {
  return Buffer.concat([
    entry(AGENT_PATH.slice(1), 0o100755, readFileSync(binary)),
    entry('TRAILER!!!', 0, Buffer.alloc(0)),
  ]);
}

/**
 * The user's part of the command line, with the word that has the kernel run the agent as init. It is the last of its kind,
 * since that one counts: the agent then runs what another rdinit= names. Words after `--` are for init.
 */
export function appendAgentInit(append: string): string {
  const word = `rdinit=${AGENT_PATH}`;
  const [, kernel = '', init = ''] = /^(.*?)((?:^|\s)--(?:\s.*)?)?$/s.exec(append) ?? [];
  return [kernel, word, init]
    .map((part) => part.trim())
    .filter(Boolean)
    .join(' ');
}

function entry(path: string, mode: number, data: Uint8Array): Buffer {
  const name = Buffer.from(`${path}\0`);
  // inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), name size, checksum
  const fields = [1, mode, 0, 0, 1, 0, data.length, 0, 0, 0, 0, name.length, 0];
  const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`);
  return Buffer.concat([padded(Buffer.concat([header, name])), padded(data)]);
}

function padded(bytes: Uint8Array): Buffer {
  return Buffer.concat([bytes, Buffer.alloc(-bytes.length & 3)]);
}
