import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, copyFileSync, existsSync } from 'node:fs';
import { connect as connectSocket } from 'node:net';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { Agent, type AgentOptions } from '#dist/agent/agent.js';
import type { Connect } from '#dist/agent/connection.js';

/** Opens the Unix socket that the agent inherits as descriptor 3 (sd_listen_fds(3)), which Node cannot. */
const LAUNCHER = `
import os, socket, sys
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(256)
os.dup2(s.fileno(), 3, True) if s.fileno() != 3 else os.set_inheritable(3, True)
if os.environ.get("AS_NOBODY"): os.chmod(sys.argv[1], 0o777); os.setgid(65534); os.setuid(65534)
os.execve(sys.argv[2], sys.argv[2:], dict(os.environ, LISTEN_FDS="1"))
`;

/** The guest's agent, the very program, run on this host behind a Unix socket. */
export class HostAgent implements AsyncDisposable {
  readonly path: string;
  readonly process: ChildProcess;
  /** What it wrote to stderr: a sanitizer's report. */
  stderr = '';

  private constructor(path: string, process: ChildProcess) {
    this.path = path;
    this.process = process;
    process.stderr?.on('data', (text) => {
      this.stderr += text;
    });
  }

  /**
   * @param folder for the socket
   * @param fuzzed with sanitizers, and as a user that may do nothing here, since it may be asked for anything
   */
  static async start(folder: string, { fuzzed = false } = {}): Promise<HostAgent> {
    const path = join(folder, 'agent.sock');
    const binary = execFileSync('guest-images/build-agent.sh', fuzzed ? ['--sanitize'] : [], { encoding: 'utf8' });
    // Where nobody may read, as in root's cache, nobody's program cannot be.
    const program = join(folder, 'tsvisor-agent');
    copyFileSync(binary.trim(), program);
    chmodSync(program, 0o755);
    if (fuzzed) chmodSync(folder, 0o755);
    const env = { ...process.env, ASAN_OPTIONS: 'detect_leaks=0', ...(fuzzed ? { AS_NOBODY: '1' } : {}) };
    const child = spawn('python3', ['-c', LAUNCHER, path, program], { env, stdio: ['ignore', 'inherit', 'pipe'] });
    for (let i = 0; !existsSync(path) && child.exitCode === null && i < 500; i++) await setTimeout(10);
    await setTimeout(20); // between bind and listen
    return new HostAgent(path, child);
  }

  get connect(): Connect {
    return async () => {
      const socket = connectSocket(this.path);
      await once(socket, 'connect');
      return socket;
    };
  }

  agent(options?: AgentOptions): Agent {
    return new Agent(this.connect, options);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return;
    const exit = once(this.process, 'exit');
    this.process.kill();
    await exit;
  }
}
