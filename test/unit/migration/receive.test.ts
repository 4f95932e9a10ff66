import { readSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { parseAddress } from '#dist/migration/address.js';
import { FrameChannel } from '#dist/migration/channel.js';
import { FrameType, versioned } from '#dist/migration/frames.js';
import { outcome } from '#dist/migration/outcome.js';
import { ownIdentity, type ProcessIdentity } from '#dist/migration/process-identity.js';
import { type Reception, receiveMachine } from '#dist/migration/receive.js';
import { connectSecurely, keyBytes } from '#dist/migration/secure.js';
import { referenceTo } from '#dist/snapshot/file-reference.js';
import { encodeState, type SnapshotState } from '#dist/snapshot/format.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const KEY = '0123456789abcdef';
const ID = 'ab'.repeat(16);
const PAGE = 4096;
const folder = temporaryFolder();
const disk = join(folder, 'disk.img');
writeFileSync(disk, 'contents');

/** A machine, as far as a target goes. */
class FakeMachine {
  resumed = 0;
  closed = 0;
  memory = Buffer.alloc(PAGE);
  failure: Error | undefined;
  async resume() {
    if (this.failure) throw this.failure;
    this.resumed++;
  }
  async close() {
    this.closed++;
  }
}

function state(more: Partial<SnapshotState> = {}): SnapshotState {
  return {
    id: ID,
    created: '',
    host: { cpu: '', kernel: '', tsvisor: '' },
    config: {},
    disks: [],
    memory: { size: PAGE },
    machine: {} as SnapshotState['machine'],
    ...more,
  };
}

const hello = (more: Partial<SnapshotState> = {}) => versioned(encodeState(state(more)));
const saved = (more: Partial<SnapshotState> = {}, paused = 0) =>
  Buffer.concat([Uint8Array.of(paused), encodeState(state(more))]);

/** The only page, full of sevens. */
const PAGES = Buffer.concat([Buffer.from([1, 0, 0, 0, 1, 0, 0, 0]), Buffer.alloc(PAGE, 7)]);

/** A target, and a way to be its source. */
class Rig {
  readonly machine = new FakeMachine();
  readonly result: Promise<FakeMachine>;
  readonly built: unknown[] = [];
  readonly address: Promise<string>;

  constructor(more: Partial<Reception<FakeMachine>> = {}) {
    let listening!: (address: string) => void;
    this.address = new Promise((resolve) => {
      listening = resolve;
    });
    this.result = receiveMachine('tcp:127.0.0.1:0', {
      key: KEY,
      timeout: 2000,
      signal: undefined,
      drives: [],
      onListening: listening,
      prepare: async () => {},
      build: async (state, drives, { fd }) => {
        this.built.push({ machine: state.machine, drives });
        readSync(fd, this.machine.memory, 0, PAGE, 0);
        return this.machine;
      },
      ...more,
    });
    this.result.catch(() => {});
  }

  async connect(): Promise<FrameChannel> {
    return new FrameChannel(await connectSecurely(parseAddress(await this.address), keyBytes(KEY), 60_000), 60_000);
  }

  /** As far as READY. */
  async ready(paused = 0): Promise<FrameChannel> {
    const channel = await this.connect();
    await channel.send(FrameType.hello, hello());
    await channel.next(FrameType.accept);
    await channel.send(FrameType.pages, PAGES);
    await channel.send(FrameType.round);
    await channel.next(FrameType.round);
    await channel.send(FrameType.state, saved({ machine: { clock: '5' } as SnapshotState['machine'] }, paused));
    await channel.next(FrameType.ready);
    return channel;
  }

  async ask(target: ProcessIdentity = ownIdentity(), id = ID): Promise<boolean | undefined> {
    const address = parseAddress(await this.address);
    return outcome({ address, psk: keyBytes(KEY), timeout: 2000, target, id });
  }
}

/** Of a host that nobody knows: whether it is there cannot be looked up. */
const ELSEWHERE: ProcessIdentity = { boot: 'another', namespace: 'another', pid: 1, started: 1 };

test('takes a machine, runs it once it is its own, and says so', async () => {
  const rig = new Rig();
  const channel = await rig.ready();
  expect(rig.machine.resumed).toBe(0);
  await channel.send(FrameType.commit);
  await channel.next(FrameType.running);
  expect(await rig.result).toBe(rig.machine);
  expect(rig.machine).toMatchObject({ resumed: 1, closed: 0, memory: Buffer.alloc(PAGE, 7) });
  expect(rig.built).toEqual([{ machine: { clock: '5' }, drives: [] }]);
  await channel.send(FrameType.done);
});

test('a machine that was paused stays so', async () => {
  const rig = new Rig();
  const channel = await rig.ready(1);
  await channel.send(FrameType.commit);
  await channel.next(FrameType.running);
  expect((await rig.result).resumed).toBe(0);
  await channel.send(FrameType.done);
});

test('what was not given away does not run, and whoever asks hears so', async () => {
  const rig = new Rig();
  const channel = await rig.ready();
  channel.destroy();
  await expect(rig.result).rejects.toMatchObject({
    code: 'ERR_MIGRATION',
    message: 'migration: the connection was lost',
  });
  expect(rig.machine).toMatchObject({ resumed: 0, closed: 1 });
  expect(await rig.ask()).toBe(false);
});

test('who asks before the machine was given away ends it: a COMMIT that comes later does nothing', async () => {
  const rig = new Rig();
  const channel = await rig.ready();
  expect(await rig.ask()).toBe(false);
  await channel.send(FrameType.commit).catch(() => {});
  await expect(rig.result).rejects.toThrow('the connection was lost');
  expect(rig.machine).toMatchObject({ resumed: 0, closed: 1 });
});

test('who asks once it was given away hears that it runs, any number of times', async () => {
  const rig = new Rig();
  const channel = await rig.ready();
  await channel.sendNow(FrameType.commit);
  channel.destroy();
  await rig.result;
  expect(await rig.ask()).toBe(true);
  expect(await rig.ask(ELSEWHERE)).toBe(true);
  expect(rig.machine).toMatchObject({ resumed: 1, closed: 0 });
  expect(await rig.ask(ownIdentity(), 'cd'.repeat(16))).toBe(false);
});

test('a machine that cannot run after all is the source’s again', async () => {
  const rig = new Rig();
  rig.machine.failure = new Error('no KVM today');
  const channel = await rig.ready();
  await channel.send(FrameType.commit);
  await expect(channel.next(FrameType.running)).rejects.toThrow('no KVM today');
  await expect(rig.result).rejects.toThrow('no KVM today');
  expect(rig.machine.closed).toBe(1);
  expect(await rig.ask()).toBe(false);
});

test('a process of this host that is gone runs nothing, and one of another that refuses neither', async () => {
  const rig = new Rig({ signal: AbortSignal.timeout(1) });
  await expect(rig.result).rejects.toThrow('timeout');
  expect(await rig.ask({ ...ownIdentity(), started: 1 })).toBe(false);
  expect(await rig.ask(ELSEWHERE)).toBe(false);
});

test('another source is turned away while one is there', async () => {
  const rig = new Rig();
  const first = await rig.ready();
  const second = await rig.connect();
  await second.send(FrameType.hello, hello());
  await expect(second.next(FrameType.accept)).rejects.toThrow('another migration is under way there');
  await first.send(FrameType.commit);
  await first.next(FrameType.running);
  await first.send(FrameType.done);
});

test('an abort ends it, also in the middle', async () => {
  const abort = new AbortController();
  const rig = new Rig({ signal: abort.signal });
  const channel = await rig.ready();
  abort.abort(new Error('enough'));
  await expect(rig.result).rejects.toThrow('enough');
  await expect(channel.next(FrameType.running)).rejects.toThrow();
  expect(rig.machine).toMatchObject({ resumed: 0, closed: 1 });
});

test.each<[string, (channel: FrameChannel) => Promise<unknown>, string]>([
  ['of another version', (c) => c.send(FrameType.hello, Buffer.from([7, 0, 0, 0])), 'speaks version 7 of the protocol'],
  ['that is no state', (c) => c.send(FrameType.hello, versioned(Buffer.from('x'))), 'not the state of a snapshot'],
  ['of no whole number of pages', (c) => c.send(FrameType.hello, hello({ memory: { size: 5000 } })), 'memory.size'],
  ['of more memory than any', (c) => c.send(FrameType.hello, hello({ memory: { size: 2 ** 41 } })), 'memory.size'],
  [
    'with disks of its own',
    (c) => c.send(FrameType.hello, hello({ disks: [{ kind: 'raw', files: [] }] })),
    'sent a drive of kind raw',
  ],
  [
    'with a file that is not the same here',
    (c) =>
      c.send(FrameType.hello, hello({ disks: [{ kind: 'reference', files: [{ ...referenceTo(disk), inode: '1' }] }] })),
    `drives[0]: ${disk} is not the same file at the target`,
  ],
  ['that begins with its state', (c) => c.send(FrameType.state, saved()), 'does not belong there'],
])('a source %s is refused', async (_, send, why) => {
  const rig = new Rig();
  const channel = await rig.connect();
  await send(channel);
  await expect(channel.next(FrameType.accept)).rejects.toThrow(why);
  expect(rig.built).toEqual([]);
});

test.each<[string, (channel: FrameChannel) => Promise<unknown>, string]>([
  ['no memory', (c) => c.send(FrameType.state, saved()), 'a machine without its memory'],
  ['less memory than it has', (c) => c.send(FrameType.round), '0 of 1 pages'],
  [
    'the state of another',
    (c) => c.send(FrameType.state, saved({ id: 'cd'.repeat(16) })),
    'the state of another machine',
  ],
  [
    'more drives in the end',
    (c) => c.send(FrameType.state, saved({ disks: [{ kind: 'reference', files: [referenceTo(disk)] }] })),
    'other drives than it described',
  ],
  ['COMMIT before all is there', (c) => c.send(FrameType.commit), 'does not belong there'],
])('a source that sends %s is refused', async (_, send, why) => {
  const rig = new Rig();
  const channel = await rig.connect();
  await channel.send(FrameType.hello, hello());
  await channel.next(FrameType.accept);
  await send(channel);
  await expect(channel.next(FrameType.ready)).rejects.toThrow(why);
  await expect(rig.result).rejects.toMatchObject({ code: 'ERR_MIGRATION' });
  expect(rig.machine.resumed).toBe(0);
});

test('a disk that was written after the guest stopped is refused', async () => {
  const rig = new Rig();
  const channel = await rig.connect();
  const disks = [{ kind: 'reference' as const, files: [referenceTo(disk)] }];
  await channel.send(FrameType.hello, hello({ disks }));
  await channel.next(FrameType.accept);
  await channel.send(FrameType.pages, PAGES);
  await channel.send(FrameType.round);
  writeFileSync(disk, 'others');
  await channel.next(FrameType.round);
  await channel.send(FrameType.state, saved({ disks }));
  await expect(channel.next(FrameType.ready)).rejects.toThrow(`${disk} is not the same file`);
});
