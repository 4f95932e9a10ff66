import {
  constants,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { finished } from 'node:stream/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { encodeFrame, FrameType, FrameWriter, MAX_DATA, OUTPUT_WINDOW } from '#dist/agent/protocol.js';
import { data, FakeAgent, frame, hello } from '../../support/fake-agent.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();
const { S_IFREG, S_IFDIR, S_IFLNK } = constants;
let fake: FakeAgent;

beforeAll(async () => {
  fake = await FakeAgent.start(folder);
});
afterAll(() => fake[Symbol.asyncDispose]());

const started = frame(FrameType.started, 1);
const exit = frame(FrameType.exit, 0, 0);
const ends = [data(FrameType.stdout), data(FrameType.stderr)];
const violated = { code: 'ERR_AGENT', message: expect.stringContaining('broke its protocol') };

async function expectClosed(): Promise<void> {
  await expect.poll(() => fake.open.size).toBe(0);
}

describe('hello', () => {
  it.each<[string, Uint8Array[]]>([
    ['another frame', [frame(FrameType.ok)]],
    ['a short one', [data(FrameType.hello, 'x')]],
    ['one without an end', [data(FrameType.hello, '\x01\0\0\0version')]],
    ['one that is too long', [data(FrameType.hello, '\x01\0\0\0version\0more')]],
    ['a frame of 4 GiB', [Buffer.alloc(8, 0xff)]],
    ['text', [Buffer.from('HTTP/1.1 400 Bad Request\r\n\r\n')]],
  ])('%s is refused', async (_name, bytes) => {
    fake.says(bytes);
    await expect(fake.agent.ping()).rejects.toMatchObject(violated);
    await expectClosed();
  });

  it('of another version is refused with both versions', async () => {
    fake.says([hello(2)]);
    await expect(fake.agent.ping()).rejects.toMatchObject({
      code: 'ERR_AGENT',
      message: expect.stringMatching(/version 2 .*version 1/),
    });
  });

  it('that does not come is not waited for for ever', async () => {
    fake.says([]);
    await expect(fake.agent.ping()).rejects.toMatchObject({ code: 'ERR_AGENT_TIMEOUT' });
    await expectClosed();
  });

  it('cut off is a lost connection', async () => {
    for (const bytes of [Buffer.alloc(0), hello().subarray(0, 5), hello().subarray(0, 12)]) {
      fake.says([bytes], true);
      await expect(fake.agent.ping()).rejects.toMatchObject({ code: 'ERR_AGENT' });
    }
  });
});

describe('a process', () => {
  it.each<[string, Uint8Array[]]>([
    ['output before the start', [data(FrameType.stdout, 'x')]],
    ['a start without a pid', [frame(FrameType.started)]],
    ['a second start', [started, started]],
    ['output after its end', [started, data(FrameType.stderr), data(FrameType.stderr, 'x')]],
    ['a second end', [started, data(FrameType.stderr), data(FrameType.stderr)]],
    ['credit that was not used', [started, frame(FrameType.credit, 0, 1_000_000)]],
    ['credit for its own output', [started, frame(FrameType.credit, 1, 1)]],
    ['an impossible code', [started, frame(FrameType.exit, 256, 0)]],
    ['a code and a signal', [started, frame(FrameType.exit, 1, 9)]],
    ['a file', [started, data(FrameType.data, 'x')]],
    ['an unknown frame', [started, frame(0x7fffffff)]],
  ])('that sends %s ends with ERR_AGENT', async (_name, bytes) => {
    fake.says([hello(), ...bytes]);
    const process = fake.agent.spawn('x', { args: [] }).then((process) => process.exited);
    await expect(process).rejects.toMatchObject(violated);
    await expect(fake.agent.exec('x')).rejects.toMatchObject(violated);
    await expectClosed();
  });

  it('that sends more output than was asked for ends with ERR_AGENT', async () => {
    const flood = Array.from({ length: OUTPUT_WINDOW / MAX_DATA + 1 }, () =>
      data(FrameType.stdout, Buffer.alloc(MAX_DATA)),
    );
    fake.says([hello(), started, ...flood]);
    const process = await fake.agent.spawn('x'); // whose output is not read
    await expect(process.exited).rejects.toMatchObject(violated);
    await expectClosed();
  });

  it('whose connection ends early is lost, whatever came before', async () => {
    for (const bytes of [[], [started], [started, exit], [started, ...ends], [started, Buffer.alloc(3)]]) {
      fake.says([hello(), ...bytes], true);
      await expect(fake.agent.exec('x', { stdin: Buffer.alloc(1 << 20) })).rejects.toMatchObject({ code: 'ERR_AGENT' });
    }
  });

  it('that answers as it should is served', async () => {
    fake.says([hello(), started, data(FrameType.stdout, 'text'), exit, ...ends]);
    expect(await fake.agent.exec('x')).toEqual({ code: 0, signal: null, stdout: 'text', stderr: '' });
  });

  it('does not go on for ever when it ignores that it is ended', async () => {
    fake.says([hello(), started]);
    const reason = new Error('enough');
    const controller = new AbortController();
    await using process = await fake.agent.spawn('x', { signal: controller.signal });
    controller.abort(reason);
    await expect(process.exited).rejects.toBe(reason);
  });

  it('that exits and does not end its output is not waited for beyond the timeout or an abort', async () => {
    fake.says([hello(), started, data(FrameType.stdout, 'text'), exit]);
    await expect(fake.agent.exec('x', { timeout: 100 })).rejects.toMatchObject({ code: 'ERR_TIMEOUT' });
    await expect(fake.agent.exec('x', { signal: AbortSignal.timeout(100) })).rejects.toThrow('timeout');
    const reason = new Error('enough');
    const controller = new AbortController();
    const process = await fake.agent.spawn('x', { signal: controller.signal, timeout: 100 });
    expect(await process.exited).toEqual({ code: 0, signal: null });
    await process.terminate(new Error('there is nothing to end'));
    controller.abort(reason);
    await expect(finished(process.stdout)).rejects.toBe(reason);
    await expectClosed();
  });

  it('whose output after its exit is more than is wanted has not merely written less', async () => {
    fake.says([hello(), started, exit, data(FrameType.stdout, 'x'.repeat(100)), ...ends]);
    const error = { code: 'ERR_EXEC', errno: 'ENOBUFS' };
    await expect(fake.agent.exec('x', { maxBuffer: 99 })).rejects.toMatchObject(error);
    expect((await fake.agent.exec('x', { maxBuffer: 100 })).stdout).toHaveLength(100);
  });

  it('whose output comes in single bytes takes no more memory than another', async () => {
    const size = 1 << 20;
    const piece = Buffer.concat(Array.from({ length: 4096 }, () => data(FrameType.stdout, 'x')));
    fake.answer = (socket) => {
      socket.write(Buffer.concat([hello(), started]));
      let left = size / 4096;
      const more = () => {
        if (left-- > 0) socket.write(piece, () => setImmediate(more));
        else socket.write(Buffer.concat([...ends, exit]));
      };
      more();
    };
    const before = process.memoryUsage().heapUsed;
    const { stdout } = await fake.agent.exec('x', { encoding: 'buffer' });
    expect(stdout.length).toBe(size);
    expect(process.memoryUsage().heapUsed - before).toBeLessThan(64 * size);
  });

  it('that does not read what it is sent loses the connection', async () => {
    const piece = Buffer.concat(Array.from({ length: 2 }, () => data(FrameType.stdout, Buffer.alloc(MAX_DATA))));
    fake.answer = (socket) => {
      socket.pause();
      socket.write(Buffer.concat([hello(), started]));
      const more = () => !socket.destroyed && socket.write(piece, () => setImmediate(more));
      more();
    };
    const process = await fake.agent.spawn('x');
    process.stdout.resume();
    await expect(process.exited).rejects.toMatchObject(violated);
  });

  it("has its errors' text freed of control characters", async () => {
    const error = new FrameWriter(FrameType.error).u32(2).string('\x1b[2Jname\r\n', 'text').frame();
    fake.says([hello(), error]);
    await expect(fake.agent.exec('x')).rejects.toMatchObject({
      code: 'ERR_EXEC',
      errno: 'ENOENT',
      message: '?[2Jname?? (in the guest): no such file or directory (ENOENT)',
    });
    fake.says([hello(), new FrameWriter(FrameType.error).u32(123456).string('', 'text').frame()]);
    await expect(fake.agent.exec('x')).rejects.toMatchObject({ errno: 'errno 123456' });
  });
});

describe('a renewal', () => {
  const error = (errno: number, subject: string) =>
    new FrameWriter(FrameType.error).u32(errno).string(subject, '').frame();

  it('that an older agent does not know is told so', async () => {
    fake.says([hello(), error(71, 'the request breaks the protocol')], true);
    await expect(fake.agent.renew({})).rejects.toMatchObject({
      code: 'ERR_AGENT',
      message: expect.stringMatching(/an identity of its own: it came with an older tsvisor; boot the guest anew/),
    });
  });

  it.each<[string, Uint8Array, RegExp]>([
    ['fails', error(19, 'eth1'), /identity of its own: eth1 .*ENODEV/],
    ['is answered with nonsense', frame(FrameType.started, 1), /broke its protocol/],
    ['is answered with half an error', frame(FrameType.error, 1), /broke its protocol/],
  ])('that %s says why', async (_name, answer, message) => {
    fake.says([hello(), answer], true);
    await expect(fake.agent.renew({})).rejects.toMatchObject({
      code: 'ERR_AGENT',
      message: expect.stringMatching(message),
    });
  });

  it('that is not answered is not waited for for ever', async () => {
    fake.says([]);
    await expect(fake.agent.renew({})).rejects.toMatchObject({ code: 'ERR_AGENT_TIMEOUT' });
  });
});

describe('a tree', () => {
  let here: string;
  let outside: string;
  beforeEach(() => {
    here = mkdtempSync(join(folder, 'tree-'));
    outside = join(here, 'outside');
    mkdirSync(outside);
  });

  const entry = (mode: number, name: string, target = '', nanoseconds = 0) =>
    new FrameWriter(FrameType.entry)
      .u32(mode)
      .u32(0)
      .u32(0)
      .u32(nanoseconds)
      .u64(0n)
      .u64(0n)
      .string(name, 'name')
      .string(target, 'target')
      .frame();
  const root = entry(S_IFDIR | 0o755, '');
  const file = (name: string, text = 'evil') => [
    entry(S_IFREG | 0o644, name),
    data(FrameType.data, text),
    data(FrameType.data),
  ];
  const leave = encodeFrame(FrameType.leave);
  const end = encodeFrame(FrameType.end);

  it.each<[string, Uint8Array[]]>([
    ['..', [root, ...file('..')]],
    ['.', [root, ...file('.')]],
    ['nothing', [root, ...file('')]],
    ['a path', [root, ...file('a/b')]],
    ['a way out', [root, ...file('../outside/file')]],
    ['an absolute path', [root, ...file('/tmp/evil')]],
    ['a folder named ..', [root, entry(S_IFDIR | 0o755, '..')]],
    ['a link named ../x', [root, entry(S_IFLNK | 0o777, '../x', '/')]],
    ['a root with a name', [...file('name')]],
    ['a root that is a link', [entry(S_IFLNK | 0o777, '', '/etc/passwd'), end]],
    ['a leave before the root', [leave]],
    ['an end in a folder', [root, end]],
    ['a leave too many', [root, leave, leave]],
    ['an entry in a file', [root, entry(S_IFREG | 0o644, 'a'), entry(S_IFREG | 0o644, 'b')]],
    ['a second root', [root, leave, root]],
    ['data in a folder', [root, data(FrameType.data, 'x')]],
    ['a link to nowhere', [root, entry(S_IFLNK | 0o777, 'a', '')]],
    ['no type', [root, entry(0o644, 'a')]],
    ['an impossible time', [root, entry(S_IFREG | 0o644, 'a', '', 1_000_000_000)]],
    ['half an entry', [root, data(FrameType.entry, 'abc')]],
    ['257 folders in each other', [root, ...Array.from({ length: 256 }, () => entry(S_IFDIR | 0o755, 'd'))]],
  ])('with %s is refused, and nothing outside is written', async (_name, bytes) => {
    fake.says([hello(), ...bytes]);
    await expect(fake.agent.fs.copyOut('/x', join(here, 'to'))).rejects.toMatchObject(violated);
    expect(readdirSync(here).filter((name) => name !== 'to')).toEqual(['outside']);
    expect(readdirSync(outside)).toEqual([]);
    await expectClosed();
  });

  it('cannot get out by a link that it made before, as a folder or a file', async () => {
    writeFileSync(join(outside, 'file'), 'untouched');
    fake.says([
      hello(),
      root,
      entry(S_IFLNK | 0o777, 'a', outside),
      entry(S_IFDIR | 0o755, 'a'),
      ...file('file'),
      leave,
      entry(S_IFLNK | 0o777, 'b', join(outside, 'file')),
      ...file('b'),
      leave,
      end,
    ]);
    await fake.agent.fs.copyOut('/x', join(here, 'to'));
    expect(readFileSync(join(outside, 'file'), 'utf8')).toBe('untouched');
    expect(readFileSync(join(here, 'to/a/file'), 'utf8')).toBe('evil');
    expect(lstatSync(join(here, 'to/b')).isFile()).toBe(true);
  });

  it('cannot put a link where a folder is', async () => {
    fake.says([
      hello(),
      root,
      entry(S_IFDIR | 0o755, 'a'),
      leave,
      entry(S_IFLNK | 0o777, 'a', outside),
      ...file('a/x'),
      leave,
      end,
    ]);
    await expect(fake.agent.fs.copyOut('/x', join(here, 'to'))).rejects.toThrow();
    expect(lstatSync(join(here, 'to/a')).isDirectory()).toBe(true);
  });

  it('cannot make a program that runs with the rights of this user', async () => {
    fake.says([hello(), root, entry(S_IFREG | 0o6777, 'a'), data(FrameType.data), leave, end]);
    await fake.agent.fs.copyOut('/x', join(here, 'to'));
    expect(lstatSync(join(here, 'to/a')).mode & 0o7777).toBe(0o777);
  });

  it('without end stops at the limits', async () => {
    const flood = (piece: Uint8Array) => {
      fake.answer = (socket) => {
        socket.write(Buffer.concat([hello(), root, entry(S_IFREG | 0o644, 'a')]));
        const more = () => {
          while (!socket.destroyed && socket.write(piece));
          if (!socket.destroyed) socket.once('drain', more);
        };
        more();
      };
    };
    flood(data(FrameType.data, Buffer.alloc(MAX_DATA)));
    const copy = fake.agent.fs.copyOut('/x', join(here, 'to'), { maxBytes: 10_000_000 });
    await expect(copy).rejects.toMatchObject({ code: 'ERR_GUEST_FILE' });
    flood(Buffer.concat([data(FrameType.data), entry(S_IFREG | 0o644, 'a')]));
    const files = fake.agent.fs.copyOut('/x', join(here, 'to'), { maxEntries: 100 });
    await expect(files).rejects.toMatchObject({ code: 'ERR_GUEST_FILE' });
    await expectClosed();
    expect(readdirSync(join(here, 'to'))).toEqual(['a']);
  });
});

describe('what is read', () => {
  const flood = (piece: Uint8Array) => {
    fake.answer = (socket) => {
      socket.write(hello());
      const more = () => !socket.destroyed && socket.write(piece, () => setImmediate(more));
      more();
    };
  };

  it('without end and contents stops', async () => {
    flood(Buffer.concat(Array.from({ length: 1000 }, () => data(FrameType.data))));
    await expect(fake.agent.fs.readFile('/x')).rejects.toMatchObject(violated);
    await expectClosed();
  });

  it('as a folder stops before it fills the memory', async () => {
    const link = new FrameWriter(FrameType.entry).u32(S_IFLNK).u32(0).u32(0).u32(0).u64(0n).u64(0n);
    const entry = link.string('name', 'name').string('t'.repeat(4000), 'target').frame();
    flood(Buffer.concat(Array.from({ length: 64 }, () => entry)));
    await expect(fake.agent.fs.list('/x')).rejects.toMatchObject(violated);
    await expectClosed();
  });
});

describe('random frames', () => {
  const seed = Number(process.env.TSVISOR_SEED ?? Date.now() % 1_000_000);
  let state = seed;
  const random = (below: number) => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    return (state >>> 8) % below;
  };
  const types = Object.values(FrameType);

  it(`settle every operation (TSVISOR_SEED=${seed})`, async () => {
    const to = join(folder, 'random');
    const operations = [
      () => fake.agent.exec('x', { stdin: 'input', timeout: 2000 }),
      () => fake.agent.ping(),
      () => fake.agent.fs.readFile('/x'),
      () => fake.agent.fs.writeFile('/x', Buffer.alloc(200_000)),
      () => fake.agent.fs.list('/x'),
      () => fake.agent.fs.stat('/x'),
      () => fake.agent.fs.copyIn(folder, '/x'),
      () => fake.agent.fs.copyOut('/x', to),
    ];
    for (let i = 0; i < 400; i++) {
      const frames = Array.from({ length: random(8) }, () => {
        const payload = Buffer.from(
          Array.from({ length: random(4) ? random(40) : 0 }, () => (random(2) ? random(256) : 0)),
        );
        return encodeFrame(random(20) ? (types[random(types.length)] ?? 0) : random(2 ** 31), payload);
      });
      const opening = i % 3 === 0 ? [frame(FrameType.started, 1)] : i % 3 === 1 ? [frame(FrameType.ok)] : [];
      fake.says([hello(), ...opening, ...frames], true);
      const operation = operations[i % operations.length] as () => Promise<unknown>;
      await operation().catch((error: Error & { code?: string }) => expect(error.code).toMatch(/^ERR_/));
    }
    await expectClosed();
    expect(existsSync(join(folder, 'random')) && readdirSync(folder).includes('evil')).toBe(false);
  });
});
