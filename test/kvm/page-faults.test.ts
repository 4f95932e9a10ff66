import { closeSync, fstatSync, openSync, readFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { TransferOrder } from '#dist/backends/transfer-order.js';
import {
  addon,
  type Mapping,
  type NativeGuestIo,
  type NativePageFaults,
  READY,
  type RunHost,
} from '#dist/kvm/addon.js';
import * as abi from '#dist/kvm/generated/abi.js';
import { mapMemory } from '#dist/kvm/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const { EIO, EPERM } = constants.errno;
const anonymous = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS;
const CHUNK = 65536;
const PAGE = 4096;
const [WRITE, FAULTS, IO] = [1, 7, 5];
const DATA = 0;
const FAILURE = 1;

const there = temporaryFolder();
const probe = addon.userfaultfd();
addon.close(probe);

describe.skipIf(probe === -EPERM)('memory whose pages are given when they are touched', () => {
  /** Two regions: two chunks, then one and a page. */
  const SIZES = [2 * CHUNK, CHUNK + PAGE] as const;
  const SIZE = SIZES[0] + SIZES[1];
  const contents = (() => {
    const bytes = new Uint8Array(SIZE);
    for (let i = 0; i < SIZE; i++) bytes[i] = (i * 7 + (i >> 8)) & 0xff;
    bytes.fill(0, PAGE, 3 * PAGE); // pages of zeros in a chunk with others
    bytes.fill(0, CHUNK, 2 * CHUNK); // and a chunk of them
    return bytes;
  })();
  let descriptors: number[];
  let mappings: Mapping[];
  let host: RunHost;
  let io: NativeGuestIo;
  let faults: NativePageFaults;
  let lost: Uint8Array;
  let channel: number;
  let stop: number;
  let file: number;

  const own = (fd: number): number => {
    expect(fd).toBeGreaterThanOrEqual(0);
    descriptors.push(fd);
    return fd;
  };
  const begin = (timeout: number) => {
    const [theirs, ours] = addon.socketpair() as [number, number];
    own(theirs);
    channel = own(ours);
    stop = own(addon.eventfd(0));
    const regions = [[0, mappings[0] as Mapping] as const, [SIZES[0], mappings[1] as Mapping] as const];
    faults = new addon.PageFaults(regions, own(addon.userfaultfd()), theirs, stop, timeout, lost, host, FAULTS);
  };
  /** The next requests for chunks. */
  const asked = async (count: number): Promise<number[]> => {
    const words = new DataView(new ArrayBuffer(4 * count));
    for (let done = 0; done < 4 * count; await delay(1)) {
      done += Math.max(0, addon.read(channel, new Uint8Array(words.buffer), done, 4 * count - done));
    }
    return Array.from({ length: count }, (_, i) => words.getUint32(4 * i, true));
  };
  const say = async (chunk: number, kind: number, bytes: Uint8Array, length = bytes.length) => {
    const message = Buffer.concat([new Uint8Array(Uint32Array.of(chunk, kind, length, 0).buffer), bytes]);
    for (let done = 0; done < message.length; await delay(1)) {
      done += Math.max(0, addon.write(channel, message, done, message.length - done));
    }
  };
  const give = (chunk: number) => say(chunk, DATA, contents.subarray(chunk * CHUNK, (chunk + 1) * CHUNK));
  /** A thread of the addon touches memory: it writes it to the file. @returns what that gives, once it is done. */
  const touch = (at: number, length: number): (() => number) => {
    expect(io.submit(1, WRITE, file, at, 0, Float64Array.of(at, length), 1)).toBe(0);
    return () => {
      const into = new Float64Array(2);
      while (io.completions(into) === 0) host.next();
      return into[1] as number;
    };
  };
  const failure = async () => {
    while (faults.failure === undefined) await delay(1);
    while (lost[0] === 0) await delay(1);
    return faults.failure;
  };

  const order = new TransferOrder();

  beforeEach(() => {
    descriptors = [];
    lost = new Uint8Array(new ArrayBuffer(1));
    host = new addon.RunHost();
    mappings = SIZES.map((size) => mapMemory(size, abi.PROT_READ | abi.PROT_WRITE, anonymous, -1, 'testing'));
    io = new addon.GuestIo(
      [
        [0, mappings[0] as Mapping],
        [SIZES[0], mappings[1] as Mapping],
      ],
      host,
      IO,
      order.words,
    );
    file = openSync(join(there, 'file'), 'w+');
  });
  afterEach(() => {
    faults.close();
    io.close();
    host.close();
    for (const mapping of mappings) mapping.unmap();
    for (const fd of descriptors) addon.close(fd);
    closeSync(file);
  });

  test('who touches them waits; each chunk is asked for once', async () => {
    begin(60_000);
    const done = touch(CHUNK - 2 * PAGE, 4 * PAGE); // two chunks
    expect(await asked(1)).toEqual([0]);
    expect(io.submit(2, WRITE, file, 0, 0, Float64Array.of(0, 10), 1)).toBe(0);
    await delay(20); // the second thread waits for the same chunk
    await give(0);
    expect(await asked(1)).toEqual([1]);
    await give(1);
    expect(done()).toBeGreaterThan(0);
    expect(done()).toBeGreaterThan(0);
    expect(readFileSync(join(there, 'file')).subarray(CHUNK - 2 * PAGE)).toEqual(
      Buffer.from(contents.subarray(CHUNK - 2 * PAGE, CHUNK + 2 * PAGE)),
    );
    expect(faults.missing).toBe(2);
    expect(addon.read(channel, new Uint8Array(4), 0, 4)).toBeLessThan(0);
  });

  test('all of them can be asked for; then it is ordinary memory', async () => {
    begin(60_000);
    faults.fetch();
    const chunks = await asked(4);
    expect(chunks).toEqual([0, 1, 2, 3]);
    for (const chunk of chunks.reverse()) await give(chunk); // in any order
    expect(host.next()).toBe(READY | FAULTS);
    expect(faults.missing).toBe(0);
    expect(faults.failure).toBeUndefined();
    expect(addon.read(channel, new Uint8Array(4), 0, 4)).toBe(0); // the source has no more to do
    const [first, second] = mappings.map(({ buffer }) => Buffer.from(new Uint8Array(buffer)));
    expect(Buffer.concat([first as Buffer, second as Buffer]).equals(contents)).toBe(true);
    faults.fetch();
  });

  test.each([
    ['says why', (): Promise<void> => say(0, FAILURE, Buffer.from('no more')), 'no more'],
    ['ends', async () => void addon.close(channel), 'its thread ended'],
    ['gives what it was not asked for', () => give(2), 'its thread gave what it was not asked for'],
    ['gives too little', () => say(0, DATA, contents.subarray(0, 100)), 'its thread gave what it was not asked for'],
    ['gives no chunk', () => say(99, DATA, new Uint8Array(CHUNK)), 'its thread gave what it was not asked for'],
    ['gives too much', () => say(0, DATA, new Uint8Array(0), 2 ** 31), 'its thread gave what it was not asked for'],
    [
      'says too much',
      () => say(0, FAILURE, new Uint8Array(0), 2 ** 32 - 1),
      'its thread gave what it was not asked for',
    ],
    ['is stopped', async () => void addon.write(stop, new Uint8Array(BigUint64Array.of(1n).buffer), 0, 8), ''],
  ])('a source that %s: who waits goes on, and writes nothing that the guest did not', async (_, act, why) => {
    begin(60_000);
    const done = touch(0, PAGE);
    expect(await asked(1)).toEqual([0]);
    await act();
    expect(await failure()).toBe(why);
    expect(done()).toBe(-EIO);
    expect(fstatSync(file).size).toBe(0);
    order.set(WRITE, file, 0, 0, Float64Array.of(0, PAGE), 1);
    expect(io.transfer()).toBe(-EIO);
    expect(host.settle(0)).toBeLessThan(0);
    expect(new Uint8Array((mappings[1] as Mapping).buffer)[9]).toBe(0);
    faults.fetch();
  });

  test('an answer that takes too long', async () => {
    begin(50);
    const done = touch(CHUNK + 5, 10);
    expect(await failure()).toBe('it did not give the bytes at 65536 within 50 ms');
    expect(done()).toBe(-EIO);
  });

  test('close() lets go of who waits', async () => {
    begin(60_000);
    const done = touch(0, PAGE);
    expect(await asked(1)).toEqual([0]);
    faults.close();
    expect(done()).toBe(-EIO);
    expect(fstatSync(file).size).toBe(0);
    expect(addon.read(channel, new Uint8Array(4), 0, 4)).toBe(0);
  });

  test('refuses memory that is none, and leaves it', () => {
    begin(60_000);
    const [a, b] = mappings as [Mapping, Mapping];
    const make = (regions: [number, Mapping][], uffd: number) =>
      new addon.PageFaults(regions, uffd, channel, stop, 1000, lost, host, FAULTS);
    const uffd = own(addon.userfaultfd());
    expect(() => make([[CHUNK, a]], uffd)).toThrow(TypeError);
    expect(() =>
      make(
        [
          [0, b],
          [SIZES[1], a],
        ],
        uffd,
      ),
    ).toThrow(TypeError); // a chunk in two regions
    expect(() => make([[0, a]], uffd)).toThrow(/UFFDIO_REGISTER/); // it is another one's
    expect(() => make([[0, a]], -1)).toThrow(/UFFDIO_REGISTER/);
    expect(() => new addon.PageFaults([], uffd, channel, stop, 1, new Uint8Array(0), host, 0)).toThrow(TypeError);
  });

  test('a terminated Worker leaves no thread, also when some wait', async () => {
    begin(60_000);
    const source = `
      const { createRequire } = require('node:module');
      const addon = createRequire(${JSON.stringify(`${process.cwd()}/x`)})('./addon/build/Release/tsvisor.node');
      const mapping = new addon.Mapping(2 ** 20, 3, 0x22, -1, 0);
      const host = new addon.RunHost();
      const faults = new addon.PageFaults([[0, mapping]], addon.userfaultfd(), addon.socketpair()[0], addon.eventfd(0), 300,
        new Uint8Array(new ArrayBuffer(1)), host, 1);
      const io = new addon.GuestIo([[0, mapping]], host, 0, new Float64Array(1000));
      for (let i = 0; i < 20; i++) io.submit(i, 1, ${file}, 0, 0, Float64Array.of(i * 4096, 4096), 1);
      globalThis.kept = [faults, io];
      require('node:worker_threads').parentPort.postMessage('up');
      for (;;);`;
    const cycle = async () => {
      const worker = new Worker(source, { eval: true });
      await new Promise((resolve) => worker.once('message', resolve));
      await worker.terminate();
    };
    for (let i = 0; i < 3; i++) await cycle();
    const before = resources();
    for (let i = 0; i < 10; i++) await cycle();
    await expectNoMoreThan(before);
    expect(fstatSync(file).size).toBe(0);
  });
});
