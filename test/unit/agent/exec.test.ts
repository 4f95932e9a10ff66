import { createHash, randomBytes } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Agent } from '#dist/agent/agent.js';
import { HostAgent } from '../../support/host-agent.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();
let host: HostAgent;
let agent: Agent;

beforeAll(async () => {
  host = await HostAgent.start(folder);
  agent = host.agent();
});
afterAll(() => host[Symbol.asyncDispose]());

const sha = (data: Uint8Array | string) => createHash('sha256').update(data).digest('hex');

/** Whether a process runs: a zombie does not. */
function runs(pid: number): boolean {
  const path = `/proc/${pid}/stat`;
  return existsSync(path) && !/\) Z/.test(readFileSync(path, 'latin1'));
}

async function waitUntilGone(pid: number): Promise<void> {
  for (let i = 0; i < 100 && runs(pid); i++) await setTimeout(50);
  expect(runs(pid)).toBe(false);
}

describe('exec', () => {
  it('runs a command line by the shell, and collects both outputs and the code', async () => {
    const result = await agent.exec('echo out; echo err >&2; exit 7');
    expect(result).toEqual({ code: 7, signal: null, stdout: 'out\n', stderr: 'err\n' });
  });

  it('runs a program with arguments as they are, found by PATH', async () => {
    const args = ['%s|', 'a b', '$HOME', '', 'ü', "'"];
    expect((await agent.exec('printf', { args })).stdout).toBe("a b|$HOME||ü|'|");
    const found = await agent.exec('tool', { args: [], env: { PATH: '/nowhere' } }).catch((error) => error);
    expect(found).toMatchObject({ code: 'ERR_EXEC', errno: 'ENOENT' });
  });

  it('carries 1 MiB each way unchanged', async () => {
    const data = randomBytes(1 << 20);
    const result = await agent.exec('tee /dev/stderr', { stdin: data, encoding: 'buffer' });
    expect(sha(result.stdout)).toBe(sha(data));
    expect(sha(result.stderr)).toBe(sha(data));
  });

  it('carries every byte value, and input from an async iterable', async () => {
    const all = Buffer.from(Array.from({ length: 256 }, (_, i) => i));
    async function* source() {
      for (let i = 0; i < 3; i++) yield all;
    }
    const { stdout } = await agent.exec('cat', { stdin: source(), encoding: 'buffer' });
    expect(stdout).toEqual(Buffer.concat([all, all, all]));
  });

  it('runs 100 one after the other, and 8 at once', async () => {
    for (let i = 0; i < 100; i++) expect((await agent.exec(`exit ${i}`)).code).toBe(i);
    const results = await Promise.all(
      Array.from({ length: 8 }, (_, i) => agent.exec(`head -c 300000 /dev/zero | tr '\\0' ${i}; exit ${i}`)),
    );
    results.forEach(({ code, stdout }, i) => {
      expect(code).toBe(i);
      expect(stdout).toBe(String(i).repeat(300_000));
    });
  });

  it('tells a signal that ended the process', async () => {
    expect(await agent.exec('kill -SEGV $$')).toMatchObject({ code: null, signal: 'SIGSEGV' });
    expect(await agent.exec('exit 255')).toMatchObject({ code: 255, signal: null });
  });

  it('ends the process group at its timeout, even one that ignores SIGTERM', async () => {
    const started = Date.now();
    const error = await agent
      .exec('trap "" TERM; echo $$ >$OUT; sleep 1000 & sleep 1000', { timeout: 500, env: { OUT: join(folder, 'pid') } })
      .catch((error) => error);
    expect(error).toMatchObject({ code: 'ERR_TIMEOUT' });
    expect(Date.now() - started).toBeGreaterThanOrEqual(500);
    expect(runs(Number(readFileSync(join(folder, 'pid'))))).toBe(false);
  });

  it('leaves a process that handles SIGTERM the time to do so', async () => {
    const file = join(folder, 'handled');
    const command = `trap 'echo yes >${file}; exit 3' TERM; while :; do sleep 0.05; done`;
    await expect(agent.exec(command, { timeout: 300 })).rejects.toMatchObject({ code: 'ERR_TIMEOUT' });
    expect(readFileSync(file, 'utf8')).toBe('yes\n');
  });

  it('rejects with the reason of an abort: before, while and without any', async () => {
    const reason = new Error('enough');
    await expect(agent.exec('true', { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    const controller = new AbortController();
    const running = agent.exec('echo $$ >$OUT; exec sleep 1000', {
      signal: controller.signal,
      env: { OUT: join(folder, 'aborted') },
    });
    while (!existsSync(join(folder, 'aborted'))) await setTimeout(20);
    controller.abort(reason);
    await expect(running).rejects.toBe(reason);
    await waitUntilGone(Number(readFileSync(join(folder, 'aborted'))));
    await expect(agent.exec('sleep 1000', { signal: AbortSignal.timeout(200) })).rejects.toMatchObject({
      name: 'TimeoutError',
    });
  });

  it('sets the environment it is told, and the usual rest', async () => {
    const { stdout } = await agent.exec('env', { args: [], env: { A: '1', B: 'x=y z', HOME: '/h', Ä: 'ö' } });
    const lines = stdout.trim().split('\n');
    expect(lines).toEqual(expect.arrayContaining(['A=1', 'B=x=y z', 'HOME=/h', 'Ä=ö', 'USER=root', 'LOGNAME=root']));
    expect(lines.filter((line) => line.startsWith('HOME='))).toHaveLength(1);
    expect(lines.some((line) => line.startsWith('PATH=/usr/local/sbin:'))).toBe(true);
    expect(lines.some((line) => line.startsWith('LISTEN_FDS'))).toBe(false);
  });

  it('takes 128 KiB of arguments and environment, and no more', async () => {
    const big = 'x'.repeat(100_000);
    const { stdout } = await agent.exec('printf "%s" "$0$BIG" | wc -c', { env: { BIG: big } });
    expect(Number(stdout)).toBeGreaterThan(100_000);
    await expect(agent.exec('true', { args: [big, big] })).rejects.toMatchObject({ code: 'ERR_USAGE' });
  });

  it('starts in the directory it is told, or at home', async () => {
    expect((await agent.exec('pwd', { cwd: '/usr' })).stdout).toBe('/usr\n');
    expect((await agent.exec('pwd')).stdout).toBe('/root\n');
    await expect(agent.exec('pwd', { cwd: '/no/where' })).rejects.toMatchObject({
      code: 'ERR_EXEC',
      errno: 'ENOENT',
      message: expect.stringMatching(/^folder \/no\/where /),
    });
  });

  it.runIf(process.getuid?.() === 0)('runs as another user, by name or number, with its groups', async () => {
    const { stdout } = await agent.exec('id -un; id -gn; echo $HOME $USER', { user: 'nobody' });
    expect(stdout).toBe('nobody\nnogroup\n/nonexistent nobody\n');
    expect((await agent.exec('id -u; id -g; id -G', { user: '1234:5678' })).stdout).toBe('1234\n5678\n5678\n');
    expect((await agent.exec('id -u; id -g', { user: 'nobody:daemon' })).stdout).toBe('65534\n1\n');
    expect((await agent.exec('cat /etc/shadow', { user: 'nobody' })).code).not.toBe(0);
    for (const user of ['nobody-there', 'root:nothing', '99999999999', '']) {
      const result = agent.exec('id -u', { user });
      if (user === '') expect((await result).stdout).toBe('0\n');
      else {
        const message = expect.stringContaining(`user ${user} `);
        await expect(result).rejects.toMatchObject({ code: 'ERR_EXEC', errno: 'ENOENT', message });
      }
    }
  });

  it('ends a process that writes more than is wanted', async () => {
    const error = await agent
      .exec('echo $$ >$OUT; exec yes', { maxBuffer: 100_000, env: { OUT: join(folder, 'yes') } })
      .catch((e) => e);
    expect(error).toMatchObject({ code: 'ERR_EXEC', errno: 'ENOBUFS' });
    expect(runs(Number(readFileSync(join(folder, 'yes'))))).toBe(false);
  });

  it('does not mind input that nobody reads', async () => {
    expect((await agent.exec('exit 4', { stdin: Buffer.alloc(1 << 20) })).code).toBe(4);
    expect((await agent.exec('exec <&-; sleep 0.2; echo done', { stdin: Buffer.alloc(1 << 20) })).stdout).toBe(
      'done\n',
    );
  });

  it('tells the failure of the input it is given', async () => {
    const reason = new Error('no more');
    // biome-ignore lint/correctness/useYield: it fails before
    async function* broken(): AsyncGenerator<Uint8Array> {
      throw reason;
    }
    await expect(agent.exec('cat', { stdin: broken() })).rejects.toBe(reason);
  });

  it('does not wait for input that does not come once the process has ended', async () => {
    let given = false;
    async function* stuck(): AsyncGenerator<Uint8Array> {
      yield Buffer.from('line\n');
      given = true;
      await new Promise(() => {});
    }
    expect((await agent.exec('read line; echo $line', { stdin: stuck() })).stdout).toBe('line\n');
    expect(given).toBe(true);
  });

  it('does not wait for background processes, nor stop them', async () => {
    const file = join(folder, 'background');
    const started = Date.now();
    const result = await agent.exec(`(sleep 1; seq 100000; echo alive >${file}) & echo started`);
    expect(result).toMatchObject({ code: 0, stdout: 'started\n' });
    expect(Date.now() - started).toBeLessThan(900);
    for (let i = 0; i < 100 && !existsSync(file); i++) await setTimeout(50);
    expect(existsSync(file)).toBe(true);
  });

  it.each([
    [{ timeout: 0 }, 'timeout'],
    [{ timeout: Number.NaN }, 'timeout'],
    [{ env: { 'A=B': '' } }, 'A=B'],
    [{ env: { A: 'x\0y' } }, 'NUL'],
    [{ args: ['\0'] }, 'NUL'],
    [{ args: [5 as unknown as string] }, 'must be text'],
    [{ args: '-l' as unknown as string[] }, 'args: must be an array'],
    [{ env: { A: undefined as unknown as string } }, 'env.A: must be text'],
    [{ stdin: 5 as unknown as string }, 'stdin: must be text'],
    [{ user: 1000 as unknown as string }, 'user: must be text'],
    [{ cwd: '/'.repeat(5000) }, 'cwd'],
    [{ tty: { rows: -1, columns: 1 } }, 'rows'],
    [{ maxBuffer: -1 }, 'maxBuffer'],
  ])('refuses option %#: %j', async (options, text) => {
    await expect(agent.exec('true', options)).rejects.toMatchObject({
      code: 'ERR_USAGE',
      message: expect.stringContaining(text),
    });
  });

  it('leaves no zombies and no processes of its own behind', async () => {
    await setTimeout(300);
    const children = readFileSync(`/proc/${host.process.pid}/task/${host.process.pid}/children`, 'utf8').trim();
    expect(children).toBe('');
  });
});

describe('spawn', () => {
  it('streams: what is written comes back while the process runs', async () => {
    await using cat = await agent.spawn('cat', { args: [] });
    expect(runs(cat.pid)).toBe(true);
    for (const text of ['one', 'two']) {
      cat.stdin.write(text);
      const [chunk] = await Promise.all([new Promise((resolve) => cat.stdout.once('data', resolve))]);
      expect(String(chunk)).toBe(text);
    }
    cat.stdin.end();
    expect(await cat.exited).toEqual({ code: 0, signal: null });
  });

  it('sends signals by name and number, to the whole group', async () => {
    await using sleeper = await agent.spawn('sleep 1000 & echo $!; wait');
    const [child] = await new Promise<string[]>((resolve) =>
      sleeper.stdout.once('data', (chunk) => resolve(String(chunk).split('\n'))),
    );
    await sleeper.kill('SIGUSR1');
    expect(await sleeper.exited).toEqual({ code: null, signal: 'SIGUSR1' });
    await waitUntilGone(Number(child));
    await sleeper.kill(); // it is over: nothing happens
    await using other = await agent.spawn('sleep', { args: ['1000'] });
    await other.kill(9);
    expect(await other.exited).toEqual({ code: null, signal: 'SIGKILL' });
    await expect(other.kill(65)).rejects.toMatchObject({ code: 'ERR_USAGE' });
  });

  it('signals a process although nobody reads its output and it reads no input', async () => {
    await using yes = await agent.spawn('yes', { args: [] });
    yes.stdin.write(Buffer.alloc(1 << 20));
    await setTimeout(300);
    await yes.kill('SIGINT');
    expect(await yes.exited).toEqual({ code: null, signal: 'SIGINT' });
  });

  it('holds back a process whose output is not read, and neither side buffers it', async () => {
    await using writer = await agent.spawn('head -c 200000000 /dev/zero; echo end >&2');
    await setTimeout(500);
    const memory = (pid: number | undefined) =>
      Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]);
    const serving = readFileSync(`/proc/${host.process.pid}/task/${host.process.pid}/children`, 'utf8')
      .trim()
      .split(' ');
    for (const pid of serving) expect(memory(Number(pid))).toBeLessThan(2048);
    expect(writer.stdout.readableLength).toBeLessThanOrEqual(400_000);
    expect(writer.stderr.readableLength).toBe(0);
    let size = 0;
    for await (const chunk of writer.stdout) size += chunk.length;
    expect(size).toBe(200_000_000);
    expect(await writer.exited).toEqual({ code: 0, signal: null });
  });

  it('discards the output of a stream that is destroyed', async () => {
    await using writer = await agent.spawn('head -c 3000000 /dev/zero; echo end >&2');
    writer.stdout.destroy();
    expect(await writer.exited).toEqual({ code: 0, signal: null });
  });

  it('fails writes with EPIPE once the process has closed its input', async () => {
    await using process = await agent.spawn('exec <&-; sleep 1000');
    const error = await new Promise<NodeJS.ErrnoException>((resolve) => process.stdin.once('error', resolve));
    expect(error.code).toBe('EPIPE');
  });

  it('ends the process when the connection to it is lost, unless it is detached', async () => {
    const sockets: { destroy(): void }[] = [];
    const { Agent } = await import('#dist/agent/agent.js');
    const own = new Agent(async (signal) => {
      const socket = await host.connect(signal);
      sockets.push(socket);
      return socket;
    });
    const lost = await own.spawn('trap "" TERM; while :; do sleep 0.1; done');
    const kept = await own.spawn('sleep', { args: ['1000'], detached: true });
    for (const socket of sockets) socket.destroy();
    await expect(lost.exited).rejects.toMatchObject({ code: 'ERR_AGENT' });
    await waitUntilGone(lost.pid);
    await expect(kept.exited).rejects.toMatchObject({ code: 'ERR_AGENT' });
    expect(runs(kept.pid)).toBe(true);
    process.kill(kept.pid);
    await waitUntilGone(kept.pid);
  });

  it('ends the process when it is disposed of', async () => {
    let pid: number;
    {
      await using sleeper = await agent.spawn('sleep', { args: ['1000'] });
      pid = sleeper.pid;
    }
    expect(runs(pid)).toBe(false);
  });
});

describe('a terminal', () => {
  it('has a size, a type and a controlling process', async () => {
    const command = 'test -t 0 -a -t 1 -a -t 2 && stty size; echo $TERM; : </dev/tty && echo controls';
    const { stdout, stderr } = await agent.exec(command, { tty: { rows: 33, columns: 99, term: 'dumb' } });
    expect(stdout).toBe('33 99\r\ndumb\r\ncontrols\r\n');
    expect(stderr).toBe('');
    expect((await agent.exec('stty size; echo $TERM', { tty: true })).stdout).toBe('24 80\r\nlinux\r\n');
  });

  it('is resized, and Ctrl-C reaches what runs in it', async () => {
    await using shell = await agent.spawn(
      "trap 'stty size' WINCH; trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.05; done",
      { tty: true },
    );
    let text = '';
    shell.stdout.on('data', (chunk) => {
      text += chunk;
    });
    const until = async (wanted: string) => {
      for (let i = 0; i < 100 && !text.includes(wanted); i++) await setTimeout(50);
      expect(text).toContain(wanted);
    };
    await until('ready');
    await shell.resize({ rows: 44, columns: 111 });
    await until('44 111');
    shell.stdin.write('\x03');
    await until('interrupted');
    expect(await shell.exited).toEqual({ code: 5, signal: null });
  });

  it('ends its input with ^D', async () => {
    expect((await agent.exec('cat', { tty: true, stdin: 'text\n' })).stdout).toBe('text\r\ntext\r\n');
  });

  it('gives all that was written before the exit', async () => {
    const { stdout } = await agent.exec('seq 20000', { tty: true });
    expect(stdout.split('\r\n')).toHaveLength(20_001);
  });

  it('hangs up when its client goes', async () => {
    let pid: number;
    {
      await using shell = await agent.spawn('bash -i', { tty: true });
      shell.stdout.resume();
      pid = shell.pid;
      await setTimeout(300);
    }
    await waitUntilGone(pid);
  });
});

it('serves no more than 64 at a time, and the rest in turn', async () => {
  const here = mkdtempSync(join(folder, 'many-'));
  await using own = await HostAgent.start(here);
  const results = await Promise.all(Array.from({ length: 100 }, (_, i) => own.agent().exec(`sleep 0.2; exit ${i}`)));
  expect(results.map(({ code }) => code)).toEqual(Array.from({ length: 100 }, (_, i) => i));
});
