import { type ChildProcess, spawn } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, readdirSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { delimiter, join, resolve } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { cli, cliPath } from './cli.js';
import { Pty } from './pty.js';
import { consoleSteps, outputPattern, printedPattern, type Snippet } from './snippets.js';

/** Seconds for a command or program; a boot on a busy host that interprets guest kernels takes minutes. */
const PATIENCE = 300;

/** A folder in which the documents' snippets are run: a project that has installed tsvisor, with files they speak of. */
export class SnippetProject {
  readonly folder: string;
  readonly #env: NodeJS.ProcessEnv;

  constructor(folder: string) {
    this.folder = folder;
    for (const name of ['bin', 'scripts', 'node_modules/@types', 'run'])
      mkdirSync(join(folder, name), { recursive: true });
    writeFileSync(join(folder, 'package.json'), '{ "private": true, "type": "module" }\n');
    this.#program('bin/tsvisor', `exec '${process.execPath}' '${cliPath}' "$@"`);
    this.#program('scripts/boot', `exec '${resolve('scripts/boot')}' "$@"`);
    symlinkSync(resolve('.'), join(folder, 'node_modules/tsvisor'));
    for (const name of ['vitest', '@types/node', 'undici-types']) {
      symlinkSync(resolve('node_modules', name), join(folder, 'node_modules', name));
    }
    this.#env = {
      ...process.env,
      PATH: [join(folder, 'bin'), process.env.PATH].join(delimiter),
      XDG_RUNTIME_DIR: join(folder, 'run'),
      PS1: '$ ',
      ENV: '',
      NO_COLOR: '1',
    };
  }

  /** The default guest's images under the names that snippets use, and some empty disks. */
  addGuest({ kernel, initrd }: { readonly kernel: string; readonly initrd: string }): void {
    symlinkSync(kernel, join(this.folder, 'vmlinux'));
    for (const name of ['initramfs.cpio', 'rootfs.cpio']) symlinkSync(initrd, join(this.folder, name));
    for (const name of ['disk.img', 'data.img', 'base.img']) {
      writeFileSync(join(this.folder, name), '');
      truncateSync(join(this.folder, name), 2 ** 24);
    }
  }

  /** Keeps a snippet in a file. @returns its path. */
  write(snippet: Snippet): string {
    // `await using` in a .js file is left to Node, which may be too old for it.
    const extension = { js: 'mts', ts: 'mts', sh: 'sh', console: 'txt' }[snippet.language];
    const name = snippet.file ?? `${snippet.document.replace(/\W/g, '-')}-${snippet.line}.${extension}`;
    const path = join(this.folder, name);
    writeFileSync(path, `${snippet.code}\n`);
    return path;
  }

  /** Runs a snippet to its end. @throws Error with all output if it fails or does not do what it says. */
  async run(snippet: Snippet): Promise<void> {
    if (snippet.language === 'console') return this.#converse(snippet);
    if (snippet.language === 'sh') {
      // Each line gets input of its own, so that a guest which is left at its shell goes on to power off.
      const lines = snippet.code
        .replaceAll('\\\n', ' ')
        .split('\n')
        .filter((line) => line.trim() !== '');
      const script = lines.map((line) => `echo ${quoted(`$ ${line}`)}\n{ ${line}\n} <<<poweroff\n`).join('');
      return this.#execute('bash', ['-euo', 'pipefail', '-c', script], { commands: lines.length });
    }
    const path = this.write(snippet);
    if (!/from 'tsvisor\/vitest'/.test(snippet.code)) {
      const printed = printedPattern(snippet.code);
      return this.#execute(resolve('node_modules/.bin/tsx'), [path], { printed });
    }
    const config = { test: { include: [path] } };
    writeFileSync(join(this.folder, 'vitest.config.mjs'), `export default ${JSON.stringify(config)};\n`);
    return this.#execute(resolve('node_modules/.bin/vitest'), ['run', '--root', this.folder]);
  }

  /** Ends the named machines that snippets have left. */
  async close(): Promise<void> {
    const machines = join(this.folder, 'run', 'tsvisor');
    if (!existsSync(machines)) return;
    for (const name of readdirSync(machines)) await cli(['stop', name], { env: this.#env });
  }

  #program(name: string, command: string): void {
    writeFileSync(join(this.folder, name), `#!/bin/sh\n${command}\n`);
    chmodSync(join(this.folder, name), 0o755);
  }

  async #execute(command: string, args: readonly string[], { commands = 1, printed = /^/ } = {}): Promise<void> {
    const child = spawn(command, args, { cwd: this.folder, env: this.#env, stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => (output += chunk));
    const code = await ended(child, PATIENCE * commands);
    if (code !== 0) throw new Error(`it ended with ${code}:\n${output}`);
    if (!printed.test(output)) throw new Error(`it did not print ${printed}, but:\n${output}`);
  }

  async #converse({ code }: Snippet): Promise<void> {
    const { steps, last } = consoleSteps(code);
    using pty = new Pty();
    pty.resize(50, 160);
    const stdio = [pty.slave, pty.slave, pty.slave];
    // A session of its own, which has the pty for its terminal.
    const child = spawn('setsid', ['--ctty', '--wait', 'sh', '-i'], { cwd: this.folder, env: this.#env, stdio });
    try {
      let seen = 0;
      const until = async (prompt: string) => {
        for (const end = Date.now() + PATIENCE * 1e3; Date.now() < end; await delay(20)) {
          const text = plain(pty.screen.slice(seen));
          const start = text.length - prompt.length;
          if (!text.endsWith(prompt) || !(start === 0 || text[start - 1] === '\n')) continue;
          seen = pty.screen.length;
          return text.slice(0, start);
        }
        throw new Error(`the prompt '${prompt}' never came:\n${pty.screen}`);
      };
      for (const [index, { prompt, command, output }] of steps.entries()) {
        if (index === 0) await until(prompt);
        pty.type(`${command}\r`);
        const next = steps[index + 1]?.prompt ?? last;
        if (next === undefined) break;
        const printed = await until(next);
        const text = printed.slice(printed.indexOf('\n') + 1).trim();
        if (!outputPattern(output).test(text)) throw new Error(`'${command}' printed\n${text}\nand not\n${output}`);
      }
    } finally {
      pty.type('\x04');
      const timer = setTimeout(() => child.kill('SIGHUP'), 2000);
      await ended(child, PATIENCE);
      clearTimeout(timer);
    }
  }
}

/** Text without escape sequences and carriage returns. */
function plain(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: terminals speak in control characters
  return text.replace(/\x1b\[[0-9;?]*[A-Za-z]|\r/g, '');
}

const quoted = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;

/** Waits for a process. @returns its exit code, or the signal that ended it. @throws Error when it takes too long. */
async function ended(child: ChildProcess, seconds: number): Promise<number | string | null> {
  const timer = setTimeout(() => child.kill('SIGKILL'), seconds * 1e3);
  const result = await new Promise<number | string | null>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code, signal) => resolve(code ?? signal));
  });
  clearTimeout(timer);
  return result;
}
