import { mkdirSync, truncateSync, utimesSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, test } from 'vitest';
import { Machine } from '#dist/index.js';
import type { Stage } from '#dist/migration/stages.js';
import { Console } from '../support/console.js';
import { guestWithPrograms } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { Cable, Peer, type PeerConfig } from '../support/migration/peer.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const BOOT = 600_000;
const CASE = 600_000;
const LOOPBACK = 'tcp:127.0.0.1:0';
const PATTERN = 'head -c 65536 /dev/vda | md5sum';

describeKvm('a machine that moves', () => {
  const folder = temporaryFolder();
  const snapshot = join(folder, 'snapshot');
  let cases = 0;
  let sum = '';

  /** A guest of 128 MiB that writes 16 MiB over and over, with a disk that it has written. */
  beforeAll(async () => {
    const images = join(folder, 'images');
    mkdirSync(images);
    const disk = join(folder, 'disk.img');
    writeFileSync(disk, '');
    truncateSync(disk, 4 << 20);
    await using machine = await Machine.create({
      ...guestWithPrograms(images, ['dirty-memory']),
      agent: true,
      memory: 128 << 20,
      drives: [{ file: disk }],
      networks: [{ type: 'user' }],
    });
    const console = new Console(machine.serial);
    await machine.start();
    await machine.ready({ timeout: BOOT });
    const write = 'dd if=/dev/urandom of=/dev/vda bs=4k count=16 2>/dev/null; sync';
    const { stdout } = await machine.exec(`${write}; ${PATTERN}; dirty-memory 16 >/dev/ttyS0 2>&1 &`, {
      timeout: BOOT,
    });
    sum = stdout;
    await console.until(/pass 3\D/, BOOT / 1e3);
    await machine.snapshot(snapshot, { stop: true });
  }, 2 * BOOT);

  const source = (more: Partial<PeerConfig> = {}) =>
    new Peer({ role: 'source', snapshot, overlay: join(folder, `${cases++}.overlay`), ...more });
  const target = (more: Partial<PeerConfig> = {}) => new Peer({ role: 'target', address: LOOPBACK, ...more });
  const waitsAt = (stages: readonly Stage[], side: 'source' | 'target'): Partial<PeerConfig> => {
    const at = stages.find((stage) => stage.startsWith(side));
    return at ? { at, act: 'wait' } : {};
  };

  test(
    'goes on with its memory, its disk and its agent, and has ended where it was',
    async () => {
      await using from = source();
      await using to = target();
      await from.runs();
      from.tell('spawn', { command: 'echo here; exec sleep 1000' });
      await from.hear('output');
      from.tell('migrate', { to: (await to.hear('listening')).listening });

      const { migrated, progress = [] } = await from.hear('migrated');
      expect((await to.hear('received')).received).toBe('running');
      expect((await from.hear('ended')).ended).toBe('migrated');
      const { lost } = await from.hear('lost');
      expect(lost).toMatchObject({ code: 'ERR_MACHINE_ENDED' });
      expect(lost?.message).toContain('the machine was moved to another process');

      // The rest was less than everything: it ran on while most was copied.
      expect(migrated?.rounds).toBeGreaterThan(0);
      expect(migrated?.bytes).toBeGreaterThan(16 << 20);
      expect(migrated?.downtimeMs).toBeLessThan(migrated?.totalMs as number);
      expect([...new Set(progress.map(({ phase }) => phase))]).toEqual([
        'connect',
        'pre-copy',
        'stop-and-copy',
        'confirm',
      ]);

      expect(await to.runs()).toBeGreaterThan(from.lastPass);
      to.tell('exec', {
        command: `echo 3 >/proc/sys/vm/drop_caches; ${PATTERN}; echo new | dd of=/dev/vda 2>/dev/null; sync`,
      });
      const { executed } = await to.hear('executed');
      expect(executed).toMatchObject({ code: 0, stdout: sum });
      expect([from, to].flatMap(({ said }) => said.filter(({ wrong }) => wrong))).toEqual([]);
    },
    CASE,
  );

  /** Of the machine that `survivor` has, and the other has not. */
  async function survives(survivor: Peer, other: Peer, passes: number): Promise<void> {
    const before = other.said.length;
    expect(await survivor.runs()).toBeGreaterThan(passes);
    expect(await survivor.runs()).toBeGreaterThan(passes);
    expect(other.said.slice(before).filter(({ pass }) => pass)).toEqual([]);
    expect([survivor, other].flatMap(({ said }) => said.filter(({ wrong }) => wrong))).toEqual([]);
  }

  const BEFORE_COMMIT = [
    'target: accepted',
    'target: round taken',
    'target: state taken',
    'target: ready sent',
  ] as const satisfies Stage[];

  test.each<Stage>([...BEFORE_COMMIT, 'target: commit heard', 'target: running'])(
    'goes on where it was when the target is killed at “%s”',
    async (at) => {
      await using from = source();
      await using to = target({ at, act: 'kill' });
      await from.runs();
      from.tell('migrate', { to: (await to.hear('listening')).listening });
      const { failed } = await from.hear('failed');
      expect(failed?.code).toBe('ERR_MIGRATION');
      await to.hear('exited');
      await survives(from, to, from.lastPass);
    },
    CASE,
  );

  test.each<Stage>(['source: commit sent', 'source: running heard'])(
    'goes on at the target when the source is killed at “%s”',
    async (at) => {
      await using from = source({ at, act: 'kill' });
      await using to = target();
      await from.runs();
      from.tell('migrate', { to: (await to.hear('listening')).listening });
      await to.hear('received');
      await from.hear('exited');
      await survives(to, from, from.lastPass);
    },
    CASE,
  );

  test.each<Stage>(['source: accepted', 'source: held', 'source: disks handed over', 'source: ready heard'])(
    'ends with its process, and does not begin at the target, when the source is killed at “%s”',
    async (at) => {
      await using from = source({ at, act: 'kill' });
      await using to = target();
      await from.runs();
      from.tell('migrate', { to: (await to.hear('listening')).listening });
      const { failed } = await to.hear('failed');
      expect(failed).toMatchObject({
        code: 'ERR_MIGRATION',
        message: expect.stringContaining('the connection was lost'),
      });
      expect(to.said.some(({ pass }) => pass)).toBe(false);
    },
    CASE,
  );

  test.each<[Stage, Stage?]>([
    ['target: accepted'],
    ['target: round taken'],
    ['target: state taken'],
    // A source that has heard READY commits at once: it waits too, or the cut might come too late.
    ['target: ready sent', 'source: ready heard'],
    ['source: round sent'],
    ['source: held'],
    ['source: disks handed over'],
    ['source: ready heard'],
  ])(
    'goes on where it was, and can be moved later, when the network is cut at “%s”',
    async (...at) => {
      const stages = at.filter((stage) => stage !== undefined);
      await using from = source(waitsAt(stages, 'source'));
      await using to = target(waitsAt(stages, 'target'));
      await from.runs();
      await using cable = await Cable.to((await to.hear('listening')).listening as string);
      from.tell('migrate', { to: cable.address });
      const waiting = stages.map((stage) => ({ peer: stage.startsWith('source') ? from : to, stage }));
      for (const { peer, stage } of waiting) await peer.hear((message) => message.stage === stage);
      cable.cut();
      for (const { peer } of waiting) peer.tell('goOn');
      expect((await from.hear('failed')).failed?.code).toBe('ERR_MIGRATION');
      expect((await to.hear('failed')).failed?.code).toBe('ERR_MIGRATION');
      await survives(from, to, from.lastPass);

      await using second = target();
      from.tell('migrate', { to: (await second.hear('listening')).listening });
      await second.hear('received');
      await survives(second, from, from.lastPass);
    },
    2 * CASE,
  );

  test.each<Stage>(['target: commit heard', 'target: running', 'source: commit sent'])(
    'is the target’s, and the source finds out, when the network is cut at “%s”',
    async (at) => {
      await using from = source(waitsAt([at], 'source'));
      await using to = target(waitsAt([at], 'target'));
      await from.runs();
      await using cable = await Cable.to((await to.hear('listening')).listening as string);
      from.tell('migrate', { to: cable.address });
      const waiting = at.startsWith('source') ? from : to;
      await waiting.hear(({ stage }) => stage === at);
      if (waiting === from) await to.hear('received');
      cable.cut();
      waiting.tell('goOn');
      await to.hear('received');
      expect((await from.hear('ended')).ended).toBe('migrated');
      await from.hear('migrated');
      await survives(to, from, from.lastPass);
    },
    CASE,
  );

  test(
    'goes on where it was when the keys differ; both are told so',
    async () => {
      await using from = source();
      await using to = target({ key: 'quite another key' });
      await from.runs();
      from.tell('migrate', { to: (await to.hear('listening')).listening });
      const said = { code: 'ERR_MIGRATION', message: expect.stringContaining('the other side has another key') };
      expect((await from.hear('failed')).failed).toMatchObject(said);
      expect((await to.hear('failed')).failed).toMatchObject(said);
      expect([...from.said, ...to.said].filter(({ stage }) => stage)).toEqual([]);
      await survives(from, to, from.lastPass);
    },
    CASE,
  );

  test(
    'goes on where it was when the target cannot have its disk',
    async () => {
      await using from = source();
      const missing = join(folder, 'no such folder', 'disk');
      await using to = target({ options: { drives: [{ overlay: missing }] } });
      await from.runs();
      from.tell('migrate', { to: (await to.hear('listening')).listening });
      expect((await from.hear('failed')).failed?.message).toContain(
        `the target refused: ${missing}: the overlay cannot be made`,
      );
      expect((await to.hear('failed')).failed?.code).toBe('ERR_MIGRATION');
      await survives(from, to, from.lastPass);
    },
    CASE,
  );

  test(
    'stays paused when it was, until it is told to go on',
    async () => {
      await using from = source();
      await using to = target({ address: `unix:${join(folder, 'target.sock')}` });
      await from.runs();
      from.tell('pause');
      await from.hear(({ state }) => state === 'paused');
      from.tell('migrate', { to: (await to.hear('listening')).listening });
      expect((await to.hear('received')).received).toBe('paused');
      to.tell('resume');
      await survives(to, from, from.lastPass);
    },
    CASE,
  );

  test(
    'stays paused when the target was killed after it had written the disk',
    async () => {
      const overlay = join(folder, 'written.overlay');
      await using from = source({ overlay });
      await using to = target({ at: 'target: running', act: 'wait' });
      await from.runs();
      from.tell('migrate', { to: (await to.hear('listening')).listening });
      await to.hear(({ stage }) => stage === 'target: running');
      utimesSync(overlay, 1, 1);
      to.kill();
      const { failed } = await from.hear('failed');
      expect(failed?.message).toContain('the machine has run there and written its disks; it is paused here');
      expect(from.said.at(-1)?.failed ? from.said.at(-2) : from.said.at(-1)).toEqual({ state: 'paused' });
      from.tell('resume');
      await survives(from, to, from.lastPass);
    },
    CASE,
  );
});
