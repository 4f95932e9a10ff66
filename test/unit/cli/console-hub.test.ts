import {
  closeSync,
  existsSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
} from 'node:fs';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { Duplex } from 'node:stream';
import koffi from 'koffi';
import { describe, expect, test } from 'vitest';
import { ConsoleHub } from '#dist/cli/machines/console-hub.js';
import { olderPart, RotatingLog } from '#dist/cli/machines/rotating-log.js';
import { duplexPair } from '../../support/duplex-pair.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const dup2 = koffi.load('libc.so.6').func('int dup2(int from, int to)');
const readsLink = (path: string) => {
  try {
    return readlinkSync(path);
  } catch {
    return undefined;
  }
};

const folder = temporaryFolder();
let count = 0;
const logPath = () => join(folder, `log-${count++}`);
const settle = () => new Promise((resolve) => setTimeout(resolve, 10));

/** A stream as a hub's client: what a test needs of a socket. */
const asClient = (stream: Duplex) => stream as Socket;

function collect(stream: Duplex): () => string {
  let text = '';
  stream.on('data', (chunk) => {
    text += chunk;
  });
  return () => text;
}

describe('a console', () => {
  const setUp = () => {
    const path = logPath();
    const log = new RotatingLog(path);
    const [guest, host] = duplexPair();
    return { path, log, guest, hub: new ConsoleHub(host, log) };
  };
  const join_ = (hub: ConsoleHub, typed = '') => {
    const [person, there] = duplexPair();
    hub.join(asClient(there), Buffer.from(typed));
    return { person, seen: collect(person) };
  };

  test('is heard by its log and all who join; each may type', async () => {
    const { path, guest, hub } = setUp();
    const heard = collect(guest);
    guest.write('before\n');
    await settle();
    const one = join_(hub, 'already ');
    const two = join_(hub);
    guest.write('after\n');
    one.person.write('one ');
    await settle();
    two.person.write('two');
    await settle();
    expect([one.seen(), two.seen()]).toEqual(['after\n', 'after\n']);
    expect(heard()).toBe('already one two');
    expect(readFileSync(path, 'utf8')).toBe('before\nafter\n');
  });

  test('shows who joins the line it is at, without what a terminal would answer', async () => {
    const { guest, hub } = setUp();
    guest.write('done\r\n\x1b[1;32m/ # ');
    guest.write('\x1b[6n\x07');
    await settle();
    const { seen } = join_(hub);
    await settle();
    expect(seen()).toBe('/ # ');
  });

  test('goes on without a client that does not read; that one is told what it misses', async () => {
    const { guest, hub } = setUp();
    const other = join_(hub);
    const [person, stuck] = duplexPair(); // the person does not read
    hub.join(asClient(stuck), Buffer.alloc(0));
    const piece = 'x'.repeat(65536);
    for (let i = 0; i < 40; i++) {
      guest.write(piece);
      await settle();
    }
    expect(other.seen()).toHaveLength(40 * 65536);
    expect(stuck.writableLength + person.readableLength).toBeLessThan(512 * 1024);
    const late = collect(person);
    await settle();
    guest.write('again');
    await settle();
    expect(late()).toMatch(/output left out\]\r\nagain$/);
  });

  test('does not hoard what is typed for a guest that does not read', async () => {
    const log = new RotatingLog(logPath());
    const deaf = new Duplex({ highWaterMark: 1024, read() {}, write() {} });
    const hub = new ConsoleHub(deaf, log);
    const { person } = join_(hub);
    for (let i = 0; i < 200; i++) person.write('x'.repeat(16384));
    await settle();
    expect(deaf.writableLength).toBeLessThan(256 * 1024);
  });

  test('is left by its clients at any moment', async () => {
    const { guest, hub } = setUp();
    const { person } = join_(hub);
    person.destroy();
    guest.write('text');
    await settle();
    const { seen } = join_(hub);
    guest.write(' more');
    await settle();
    expect(seen()).toBe('text more');
  });
});

describe('a log', () => {
  test('is two files at most, each of a bounded size', () => {
    const path = logPath();
    using log = new RotatingLog(path, 100);
    for (let i = 0; i < 50; i++) log.write(Buffer.from(`line ${String(i).padStart(3, '0')}\n`));
    expect(statSync(path).size).toBeLessThanOrEqual(100);
    expect(statSync(olderPart(path)).size).toBeLessThanOrEqual(100);
    const all = readFileSync(olderPart(path), 'utf8') + readFileSync(path, 'utf8');
    expect(all).toMatch(/^line \d+\n(line \d+\n)*line 049\n$/);
    expect(all.length).toBeGreaterThan(100);
    expect(statSync(path).mode & 0o777).toBe(0o600);
  });

  test('that is removed does not come back', () => {
    const path = logPath();
    using log = new RotatingLog(path, 10);
    log.write(Buffer.from('12345678'));
    rmSync(path);
    log.write(Buffer.from('12345678'));
    log.write(Buffer.from('12345678'));
    expect(existsSync(path) || existsSync(olderPart(path))).toBe(false);
  });

  test('does not write through a symbolic link', () => {
    const [path, victim] = [logPath(), logPath()];
    symlinkSync(victim, path);
    expect(() => new RotatingLog(path)).toThrow(/EEXIST/);
    expect(existsSync(victim)).toBe(false);
  });

  test('whose disk is full loses what is written meanwhile, and no descriptor', () => {
    const before = readdirSync('/proc/self/fd').length;
    const path = logPath();
    {
      using log = new RotatingLog(path, 100);
      const fd = readdirSync('/proc/self/fd').find((it) => readsLink(`/proc/self/fd/${it}`) === path);
      const full = openSync('/dev/full', 'w');
      expect(dup2(full, Number(fd))).toBe(Number(fd));
      closeSync(full);
      for (let i = 0; i < 12; i++) log.write(Buffer.from('lost 67\n'));
      expect(statSync(path).size).toBe(0);
      log.write(Buffer.from('there is room again\n'));
    }
    expect(readFileSync(path, 'utf8')).toBe('there is room again\n');
    expect(readdirSync('/proc/self/fd').length).toBe(before);
  });
});
