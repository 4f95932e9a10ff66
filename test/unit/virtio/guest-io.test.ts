import { execFileSync } from 'node:child_process';
import { closeSync, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { GuestIo, IoOperation, type IoRequest } from '#dist/backends/guest-io.js';
import { addon, READY, type RunHost } from '#dist/kvm/addon.js';
import { FdEvents } from '#dist/machine/fd-events.js';
import { Segments } from '#dist/virtio/segments.js';
import { expectNoMoreThan, resources } from '../../support/process-resources.js';
import { mockMemory } from '../../support/virtio/mock-driver.js';

const { ECANCELED } = constants.errno;
const { memory, mapping } = mockMemory(1 << 20);
let folder: string;
let file: number;
let host: RunHost;
let io: GuestIo;
let events: FdEvents;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tsvisor-io-'));
  file = openSync(join(folder, 'file'), 'w+');
  host = new addon.RunHost();
  events = new FdEvents(host);
  io = new GuestIo([[0, mapping]], memory, events);
});
afterEach(() => {
  io[Symbol.dispose]();
  host.close();
  closeSync(file);
  rmSync(folder, { recursive: true });
});

/** One event, as the run loop dispatches it. */
function turn(): void {
  const event = host.next();
  expect(event).toBeGreaterThanOrEqual(READY);
  events.dispatch(event & 0xffff);
}

function drain(): void {
  while (io.pending > 0) turn();
}

function segments(...pairs: (readonly [number, number])[]): Segments {
  const all = new Segments(memory);
  for (const [gpa, length] of pairs) all.add(gpa, length);
  return all;
}

class Request implements IoRequest {
  readonly results: number[] = [];
  readonly next: (() => void) | undefined;
  constructor(next?: () => void) {
    this.next = next;
  }
  ioDone(result: number): void {
    this.results.push(result);
    this.next?.();
  }
}

test('moves a segment list at once, with a prefix or without', () => {
  memory.write(100, Uint8Array.of(1, 2, 3, 4));
  const list = segments([102, 2], [100, 1]);
  list.add(0, 50);
  list.count--; // what lies behind the count is not moved
  expect(io.transfer(IoOperation.write, file, 1, list, 0)).toBe(3);
  expect(io.transfer(IoOperation.write, file, 4, list, 0, Uint8Array.of(9))).toBe(4);
  expect([...readFileSync(join(folder, 'file'))]).toEqual([0, 3, 4, 1, 9, 3, 4, 1]);
  expect(io.transfer(IoOperation.read, file, 4, segments([200, 100]), 0)).toBe(4);
  expect([...memory.slice(200, 5)]).toEqual([9, 3, 4, 1, 0]);
  expect(io.transfer(IoOperation.read, file, 0, segments([1 << 20, 1]), 0)).toBe(-constants.errno.EFAULT);
});

test('tells each request of its own result, once, and never before submit() is over', () => {
  ftruncateSync(file, 100);
  const requests = Array.from({ length: 150 }, () => new Request());
  requests.forEach((request, i) => {
    const long = i % 2 === 0;
    io.submit(request, IoOperation.read, file, long ? 0 : 90, 0, segments([0, i + 1]));
    expect(request.results).toEqual([]);
  });
  expect(io.pending).toBe(150);
  drain();
  expect(requests.map(({ results }) => results)).toEqual(
    requests.map((_, i) => [Math.min(i + 1, i % 2 === 0 ? 100 : 10)]),
  );
});

test('lets a request submit the next one from ioDone, and calls listeners after each batch', () => {
  const order: string[] = [];
  let left = 100;
  const request = new Request(() => {
    order.push('done');
    if (--left > 0) io.submit(request, IoOperation.flush, file, 0, 0);
  });
  io.onBatch(() => order.push('batch'));
  io.onBatch(() => order.push('second'));
  io.submit(request, IoOperation.flush, file, 0, 0);
  drain();
  expect(request.results).toHaveLength(100);
  expect(order.filter((what) => what === 'done')).toHaveLength(100);
  expect(order.slice(-2)).toEqual(['batch', 'second']);
  expect(order.join(' ')).not.toMatch(/batch (?!second)/);
});

test('reuses what it keeps of requests', () => {
  for (let round = 0; round < 50; round++) {
    const requests = [new Request(), new Request()];
    for (const request of requests) io.submit(request, IoOperation.flush, file, 0, 0);
    expect(io.pending).toBe(2);
    drain();
    expect(requests.map(({ results }) => results)).toEqual([[0], [0]]);
  }
});

test('refuses memory that the guest does not have, and forgets the request', () => {
  const request = new Request();
  expect(() => io.submit(request, IoOperation.write, file, 0, 0, segments([(1 << 20) - 1, 2]))).toThrow(
    /^I\/O on memory that the guest does not have \(-14\)$/,
  );
  expect(io.pending).toBe(0);
  io.submit(request, IoOperation.flush, file, 0, 0);
  drain();
  expect(request.results).toEqual([0]);
});

test('punches and zeroes by length', () => {
  memory.write(0, new Uint8Array(16384).fill(7));
  const request = new Request();
  io.submit(request, IoOperation.write, file, 0, 0, segments([0, 16384]));
  drain();
  io.submit(request, IoOperation.punchHole, file, 4096, 4096);
  io.submit(request, IoOperation.zeroRange, file, 12288, 1);
  drain();
  expect(request.results).toEqual([16384, 0, 0]);
  const bytes = readFileSync(join(folder, 'file'));
  expect(bytes.every((byte, i) => byte === ((i >= 4096 && i < 8192) || i === 12288 ? 0 : 7))).toBe(true);
});

test('cancel completes what has not begun; it works on afterwards', () => {
  const requests = Array.from({ length: 100 }, () => new Request());
  const all = segments(...Array.from({ length: 10 }, () => [0, 1 << 20] as const));
  for (const request of requests) io.submit(request, IoOperation.write, file, 0, 0, all);
  io.cancel(() => true);
  drain();
  const results = requests.flatMap((request) => request.results);
  expect(results).toHaveLength(100);
  expect(results.filter((result) => result === -ECANCELED).length).toBeGreaterThan(50);
  const after = new Request();
  io.submit(after, IoOperation.flush, file, 0, 0);
  drain();
  expect(after.results).toEqual([0]);
});

/** Writes of this process so far: system calls. */
const writeCalls = () => Number(/syscw: (\d+)/.exec(readFileSync('/proc/self/io', 'utf8'))?.[1]);

/** Pages 0 to count - 1 of memory, each of another byte. */
function fillPages(count: number): void {
  for (let i = 0; i < count; i++) memory.write(4096 * i, new Uint8Array(4096).fill(i + 1));
}

test('writes that follow one another in a file go together', () => {
  fillPages(100);
  const busy = segments(...Array.from({ length: 64 }, () => [0, 1 << 20] as const));
  const before = writeCalls();
  io.submit(new Request(), IoOperation.write, file, 1 << 20, 0, busy);
  const requests = Array.from({ length: 100 }, () => new Request());
  requests.forEach((request, i) => {
    io.submit(request, IoOperation.write, file, 4096 * i, 0, segments([4096 * i, 1000], [4096 * i + 1000, 3096]));
  });
  drain();
  expect(requests.every(({ results }) => results.length === 1 && results[0] === 4096)).toBe(true);
  const bytes = readFileSync(join(folder, 'file')).subarray(0, 4096 * 100);
  expect(bytes.every((byte, i) => byte === Math.floor(i / 4096) + 1)).toBe(true);
  expect(writeCalls() - before).toBeLessThan(20);
});

test('writes that fail together have each a result of its own', () => {
  fillPages(8);
  const busy = segments(...Array.from({ length: 64 }, () => [0, 1 << 20] as const));
  const requests = Array.from({ length: 8 }, () => new Request());
  const limitFile = (size: string) => execFileSync('prlimit', ['--pid', String(process.pid), `--fsize=${size}:`]);
  limitFile(String((64 << 20) + 3 * 4096 + 100));
  try {
    io.submit(new Request(), IoOperation.write, file, 0, 0, busy);
    requests.forEach((request, i) => {
      io.submit(request, IoOperation.write, file, (64 << 20) + 4096 * i, 0, segments([4096 * i, 4096]));
    });
    drain();
  } finally {
    limitFile('unlimited');
  }
  const { EFBIG } = constants.errno;
  expect(requests.flatMap(({ results }) => results)).toEqual([4096, 4096, 4096, ...Array(5).fill(-EFBIG)]);
});

test('dispose tells no request anything and leaves no descriptor or thread', async () => {
  const before = resources();
  const other = new GuestIo([[0, mapping]], memory, events);
  const request = new Request();
  for (let i = 0; i < 20; i++) other.submit(request, IoOperation.write, file, 0, 0, segments([0, 1 << 20]));
  other[Symbol.dispose]();
  await expectNoMoreThan(before);
  expect(request.results).toEqual([]);
});

test('what is read into memory is noted as written, at the latest when it is done', () => {
  ftruncateSync(file, 20_000);
  memory.trackWrites();
  const taken = () => {
    const pages = new Uint8Array(memory.size / 4096);
    memory.takeWrites(0, pages);
    return [...pages].flatMap((mark, page) => (mark ? [page] : []));
  };
  io.transfer(IoOperation.read, file, 0, segments([4095, 2], [40960, 1]), 0);
  expect(taken()).toEqual([0, 1, 10]);
  io.transfer(IoOperation.write, file, 0, segments([8192, 10]), 0);
  expect(taken()).toEqual([]);
  let whenDone: number[] = [];
  const request = new Request(() => {
    whenDone = taken();
  });
  io.submit(request, IoOperation.read, file, 0, 0, segments([20480, 4097], [0, 1]));
  drain();
  expect(whenDone).toEqual([0, 5, 6]);
  io.submit(new Request(), IoOperation.write, file, 0, 0, segments([20480, 4097]));
  io.submit(new Request(), IoOperation.flush, file, 0, 0);
  drain();
  expect(taken()).toEqual([]);
  memory.ignoreWrites();
});
