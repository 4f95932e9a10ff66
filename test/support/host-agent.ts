import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
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

  /** @param folder for the socket; @param name of the socket */
  static async start(folder: string, { name = 'agent.sock', sanitize = false } = {}): Promise<HostAgent> {
    const path = join(folder, name);
    const binary = execFileSync('guest-images/build-agent.sh', sanitize ? ['--sanitize'] : [], { encoding: 'utf8' });
    const child = spawn('python3', ['-c', LAUNCHER, path, binary.trim()], { stdio: ['ignore', 'inherit', 'pipe'] });
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
