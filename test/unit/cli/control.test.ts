import { statSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { ask, ControlClient } from '#dist/cli/machines/control-client.js';
import { IDLE_MS, MAX_CLIENTS, MAX_LINE } from '#dist/cli/machines/control-protocol.js';
import { type ControlHandlers, ControlServer } from '#dist/cli/machines/control-server.js';
import { MachineFolder } from '#dist/cli/machines/machine-folder.js';
import { TsvisorError } from '#dist/errors.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

process.env.XDG_RUNTIME_DIR = temporaryFolder();

/** A machine that does nothing but answer. */
class FakeMachine {
  stops: object[] = [];
  givenUp = '';
  end = () => {};
  typed = '';
  console: Socket | undefined;
  say = (text: string) => this.console?.write(text);
  readonly ended = new Promise<{ message: string; exitCode: number; reason: 'stopped' }>((resolve) => {
    this.end = () => resolve({ message: 'it ended', exitCode: 0, reason: 'stopped' });
  });

  readonly handlers: ControlHandlers = {
    status: async () => ({
      name: 'web',
      pid: 1,
      state: 'running',
      uptime: 5,
      memory: 1,
      cpus: 1,
      kernel: 'default',
      agent: true,
      console: true,
      vsock: '/v',
      detached: false,
    }),
    wait: () => this.ended,
    ready: async () => {
      throw new TsvisorError('ERR_AGENT_TIMEOUT', 'it is not there');
    },
    stop: async (params) => {
      this.stops.push(params);
      this.end();
      return this.ended;
    },
    snapshot: async ({ folder }, { signal }) => {
      await new Promise((resolve) => signal.addEventListener('abort', resolve));
      this.givenUp = folder;
      throw new TsvisorError('ERR_SNAPSHOT', 'given up');
    },
    migrate: async ({ key }, { onProgress }) => {
      onProgress({ phase: 'pre-copy', round: key.length, bytesSent: 1, bytesRemaining: 2 });
      return { downtimeMs: 1, totalMs: 2, rounds: 3, bytes: 4 };
    },
    console: () => (client, typed) => {
      this.console = client;
      this.typed = typed.toString();
      client.on('data', (chunk) => {
        this.typed += chunk;
      });
      client.resume();
    },
    resize: async () => {
      throw new Error('a defect');
    },
  };
}

let folder: MachineFolder;
let machine: FakeMachine;
let server: ControlServer;
beforeEach(async () => {
  folder = await MachineFolder.claim('web');
  machine = new FakeMachine();
  server = await ControlServer.listen(folder.paths.control, machine.handlers);
});
afterEach(async () => {
  await server[Symbol.asyncDispose]();
  folder.release();
});

/** A client that keeps to nothing. */
function rude(): Socket & { text: () => string; gone: Promise<void> } {
  const socket = connect(folder.paths.control);
  let text = '';
  socket.on('data', (chunk) => {
    text += chunk;
  });
  socket.on('error', () => {});
  const gone = new Promise<void>((resolve) => socket.on('close', () => resolve()));
  return Object.assign(socket, { text: () => text, gone });
}

const save = (folder: string) => ({ folder, disks: 'copy', differential: false, track: false, stop: false });

const answerTo = async (line: string) => {
  const socket = rude();
  socket.write(line);
  await vi.waitFor(() => expect(socket.text()).toContain('\n'));
  socket.destroy();
  return JSON.parse(socket.text());
};

describe('requests', () => {
  test('are answered, several on a connection', async () => {
    using client = await ControlClient.connect('web');
    expect(await client.request('status', {})).toMatchObject({ name: 'web', state: 'running' });
    expect(await client.request('status', {})).toMatchObject({ uptime: 5 });
  });

  test('that fail reject with the machine’s error', async () => {
    await expect(ask('web', 'ready', { timeout: 1 })).rejects.toMatchObject({
      code: 'ERR_AGENT_TIMEOUT',
      message: 'it is not there',
    });
    await expect(ask('web', 'resize', { rows: 1, columns: 1 })).rejects.toMatchObject({ code: 'ERR_INTERNAL' });
  });

  test('may wait for the end, and others go on meanwhile', async () => {
    const waiting = ask('web', 'wait', {}, { timeout: Infinity });
    expect(await ask('web', 'status', {})).toMatchObject({ name: 'web' });
    expect(await ask('web', 'stop', { timeout: 7, force: false })).toMatchObject({ reason: 'stopped' });
    expect(machine.stops).toEqual([{ timeout: 7, force: false }]);
    expect(await waiting).toMatchObject({ message: 'it ended' });
  });

  test('are given up in time, by a signal, and when the machine goes', async () => {
    await expect(ask('web', 'wait', {}, { timeout: 20 })).rejects.toMatchObject({ code: 'ERR_TIMEOUT' });
    const reason = new Error('enough');
    await expect(ask('web', 'wait', {}, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    const controller = new AbortController();
    setTimeout(() => controller.abort(reason), 20);
    await expect(ask('web', 'wait', {}, { signal: controller.signal })).rejects.toBe(reason);
    const waiting = ask('web', 'wait', {}, { timeout: Infinity });
    waiting.catch(() => {});
    await delay(20);
    await server[Symbol.asyncDispose]();
    await expect(waiting).rejects.toMatchObject({ code: 'ERR_MACHINE_ENDED' });
  });

  test('that can be given up are, before the client goes', async () => {
    const reason = new Error('enough');
    const controller = new AbortController();
    setTimeout(() => controller.abort(reason), 20);
    const params = { folder: '/x', disks: 'copy', differential: false, track: false, stop: false } as const;
    const asked = ask('web', 'snapshot', params, { timeout: Infinity, signal: controller.signal, withdraw: true });
    await expect(asked).rejects.toBe(reason);
    expect(machine.givenUp).toBe('/x');
  });

  test('tell how far they are before their answer', async () => {
    const onProgress = vi.fn();
    const params = { address: 'unix:/x', key: 'four', maxDowntime: 300 };
    expect(await ask('web', 'migrate', params, { onProgress })).toMatchObject({ rounds: 3 });
    expect(onProgress.mock.calls).toEqual([[expect.objectContaining({ round: 4, bytesRemaining: 2 })]]);
  });

  test('to a machine that is not there', async () => {
    await expect(ask('other', 'status', {})).rejects.toMatchObject({ code: 'ERR_MACHINE_NOT_FOUND' });
    await expect(ask('../x', 'status', {})).rejects.toMatchObject({ code: 'ERR_USAGE' });
  });
});

describe('a client that keeps to nothing', () => {
  const wrong: [string, string, RegExp][] = [
    ['no JSON', 'GET / HTTP/1.1', /JSON/],
    ['no object', '7', /version/],
    ['null', 'null', /version/],
    ['another version', '{"version":2,"method":"status"}', /version 1/],
    ['an unknown method', '{"version":1,"method":"explode"}', /explode/],
    ['a method of Object', '{"version":1,"method":"constructor"}', /constructor/],
    ['parameters of the wrong kind', '{"version":1,"method":"stop","params":{"timeout":"1","force":true}}', /stop/],
    ['no parameters', '{"version":1,"method":"stop"}', /stop/],
    ['half a path', `{"version":1,"method":"snapshot","params":${JSON.stringify(save('x'))}}`, /snapshot/],
    ['a path with NUL', `{"version":1,"method":"snapshot","params":${JSON.stringify(save('/x\0'))}}`, /snapshot/],
    ['a size that is none', '{"version":1,"method":"resize","params":{"rows":0,"columns":1e9}}', /resize/],
  ];
  test.each(wrong)('is told: %s', async (_name, line, message) => {
    const { error } = await answerTo(`${line}\n`);
    expect(error).toMatchObject({ code: 'ERR_USAGE', message: expect.stringMatching(message) });
    expect(machine.stops).toEqual([]);
  });

  test('is sent away when its line does not end', async () => {
    const socket = rude();
    socket.write('x'.repeat(MAX_LINE * 20));
    await socket.gone;
    expect(socket.text()).toMatch(/more than/);
    expect(await ask('web', 'status', {})).toMatchObject({ name: 'web' });
  });

  test('may go at any moment', async () => {
    for (const said of [
      '',
      '{"ver',
      '{"version":1,"method":"wait"}\n',
      '{"version":1,"method":"status"}\n'.repeat(50),
    ]) {
      const socket = rude();
      socket.write(said);
      await delay(10);
      socket.destroy();
    }
    expect(await ask('web', 'status', {})).toMatchObject({ name: 'web' });
  });

  test('is sent away when it says nothing; one that waits is not', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    try {
      const silent = rude();
      const waiting = rude();
      waiting.write('{"version":1,"method":"wait"}\n');
      for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve));
      vi.advanceTimersByTime(IDLE_MS + 1);
      await silent.gone;
      expect(waiting.destroyed).toBe(false);
      machine.end();
      for (let i = 0; i < 50 && waiting.text() === ''; i++) await new Promise((resolve) => setImmediate(resolve));
      expect(waiting.text()).toContain('it ended');
      waiting.destroy();
    } finally {
      vi.useRealTimers();
    }
  });

  test('cannot keep others away for longer than it stays', async () => {
    const crowd = Array.from({ length: MAX_CLIENTS + 8 }, () => rude());
    await Promise.race(crowd.map(({ gone }) => gone)); // some were too many
    for (const socket of crowd) socket.destroy();
    await vi.waitFor(async () => expect(await ask('web', 'status', {})).toMatchObject({ name: 'web' }));
  });
});

test('the console’s connection carries bytes, also those that came with the request', async () => {
  const socket = rude();
  socket.write('{"version":1,"method":"console"}\nls\n');
  await vi.waitFor(() => expect(machine.console).toBeDefined());
  socket.write('more\n');
  await vi.waitFor(() => expect(machine.typed).toBe('ls\nmore\n'));
  machine.say('output');
  await vi.waitFor(() => expect(socket.text()).toBe('{"result":{}}\noutput'));
  socket.destroy();
  const client = await ControlClient.connect('web');
  const first = machine.console;
  const bytes = await client.console();
  let heard = '';
  bytes.on('data', (chunk) => {
    heard += chunk;
  });
  bytes.resume();
  await vi.waitFor(() => expect(machine.console).not.toBe(first));
  machine.say('said');
  await vi.waitFor(() => expect(heard).toBe('said'));
  client[Symbol.dispose]();
});

test('the socket is this user’s alone, and is not removed for the next one’s', async () => {
  const { control } = folder.paths;
  expect(statSync(control).mode & 0o777).toBe(0o600);
  const next = await ControlServer.listen(control, machine.handlers);
  await server[Symbol.asyncDispose]();
  expect(await ask('web', 'status', {})).toMatchObject({ name: 'web' });
  await next[Symbol.asyncDispose]();
  await expect(ask('web', 'status', {})).rejects.toMatchObject({ code: 'ERR_MACHINE_NOT_FOUND' });
  const nowhere = ControlServer.listen(join(folder.paths.folder, 'no', 'x'), machine.handlers);
  await expect(nowhere).rejects.toMatchObject({ code: 'ERR_OUTPUT' });
});
