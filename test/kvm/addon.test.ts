import { execFileSync } from 'node:child_process';
import {
  closeSync,
  constants as fsConstants,
  fstatSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { MAX_PIECES, MAX_PREFIX, TransferOrder } from '#dist/backends/transfer-order.js';
import { addon, type Mapping, type NativeGuestIo, READY, type RunHost } from '#dist/kvm/addon.js';
import * as abi from '#dist/kvm/generated/abi.js';
import { Kvm, kvmIoctl, mapMemory } from '#dist/kvm/kvm.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';

const { EBADF, EBUSY, ECANCELED, EFAULT, EINVAL } = constants.errno;
const anonymous = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS;

test.each(['src/kvm/generated/abi.ts', 'src/virtio/generated/virtio.ts'])(
  '%s is what the installed kernel headers give',
  (path) => {
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-abi-'));
    execFileSync('scripts/abi/generate', [folder]);
    expect(readFileSync(path, 'utf8')).toBe(readFileSync(join(folder, basename(path)), 'utf8'));
    rmSync(folder, { recursive: true });
  },
);

describe('system calls', () => {
  test('fail with -errno', () => {
    expect(addon.open('/nonexistent', 0)).toBe(-constants.errno.ENOENT);
    expect(addon.close(9999)).toBe(-EBADF);
    expect(addon.ioctl(9999, abi.KVM_GET_API_VERSION)).toBe(-EBADF);
  });

  test('refuse arguments that do not fit the request', () => {
    const short = new Uint8Array(8);
    expect(() => addon.ioctl(0, abi.KVM_GET_REGS, short)).toThrow(TypeError);
    expect(() => addon.ioctl(0, abi.KVM_GET_REGS, 0)).toThrow(/takes a view/);
    expect(() => addon.ioctl(0, abi.KVM_GET_REGS)).toThrow(/takes a view/);
    expect(() => addon.ioctl(0, abi.KVM_GET_XSAVE2, new Uint8Array(4096))).toThrow(/too short/);
    // A count that promises more entries than the buffer has.
    const cpuid = new DataView(new ArrayBuffer(abi.kvm_cpuid2.sizeof + abi.kvm_cpuid_entry2.sizeof));
    cpuid.setUint32(0, 2, true);
    expect(() => addon.ioctl(0, abi.KVM_SET_CPUID2, cpuid)).toThrow(/too short/);
    expect(() => addon.read(0, short, 4, 5)).toThrow(TypeError);
    expect(() => addon.write(1, short, 9, 0)).toThrow(TypeError);
    const region = new Uint8Array(abi.kvm_userspace_memory_region.sizeof);
    new DataView(region.buffer).setBigUint64(abi.kvm_userspace_memory_region.memory_size, 8192n, true);
    const at = abi.kvm_userspace_memory_region.userspace_addr;
    const backing = new Uint8Array(4096);
    expect(() => addon.ioctl(0, abi.KVM_SET_USER_MEMORY_REGION, region, at, backing)).toThrow(
      /longer than its backing/,
    );
    expect(() => addon.ioctl(0, abi.KVM_SET_USER_MEMORY_REGION, region, 30, backing)).toThrow(/bad pointer/);
  });

  test('a memfd maps shared and holds its size', () => {
    const fd = addon.memfdCreate('test', 8192);
    const one = mapMemory(8192, abi.PROT_READ | abi.PROT_WRITE, abi.MAP_SHARED, fd, 'testing');
    const two = mapMemory(8192, abi.PROT_READ, abi.MAP_SHARED, fd, 'testing');
    new Uint8Array(one.buffer)[8191] = 7;
    expect(new Uint8Array(two.buffer)[8191]).toBe(7);
    for (const mapping of [one, two]) mapping.unmap();
    expect(addon.close(fd)).toBe(0);
  });

  test('a socket pair carries bytes and says when it is full or empty', () => {
    const [here, there] = addon.socketpair() as [number, number];
    const buffer = new Uint8Array(65536).fill(5);
    expect(addon.read(there, buffer, 0, 10)).toBe(-constants.errno.EAGAIN);
    let sent = 0;
    for (let n = 0; n >= 0; n = addon.write(here, buffer, 0, buffer.length)) sent += n;
    let received = 0;
    for (let n = 0; n >= 0; n = addon.read(there, buffer, 0, buffer.length)) received += n;
    expect(received).toBe(sent);
    addon.close(here);
    expect(addon.read(there, buffer, 0, 1)).toBe(0);
    addon.close(there);
  });
});

describe('mappings', () => {
  test('unmap makes every view empty', () => {
    const mapping = mapMemory(4096, abi.PROT_READ | abi.PROT_WRITE, anonymous, -1, 'testing');
    const bytes = new Uint8Array(mapping.buffer);
    bytes[0] = 1;
    mapping.unmap();
    mapping.unmap();
    expect(bytes.length).toBe(0);
    expect(bytes[0]).toBeUndefined();
  });

  test('that cannot be made name their purpose', () => {
    expect(() => mapMemory(0, abi.PROT_READ, anonymous, -1, 'testing')).toThrow(
      /^mmap failed with EINVAL while testing/,
    );
  });
});

describe('RunHost without a vCPU', () => {
  test('reports a descriptor that was ready before, once for each watch', () => {
    const host = new addon.RunHost();
    const fd = addon.eventfd(1);
    expect(host.watch(fd, 17, abi.EPOLLIN)).toBe(0);
    expect(host.next()).toBe(READY | 17);
    expect(host.watch(fd, 18, abi.EPOLLIN)).toBe(0); // still readable: level-triggered
    expect(host.next()).toBe(READY | 18);
    expect(host.unwatch(fd)).toBe(0);
    expect(host.unwatch(fd)).toBe(-constants.errno.ENOENT);
    host.close();
    expect(host.watch(fd, 1, abi.EPOLLIN)).toBe(-EBADF);
    expect(host.next()).toBe(-EBADF);
    addon.close(fd);
  });

  test('wakes for a timer', () => {
    const host = new addon.RunHost();
    const fd = addon.timerfdCreate();
    addon.timerfdSet(fd, 20_000);
    host.watch(fd, 3, abi.EPOLLIN);
    const start = performance.now();
    expect(host.next()).toBe(READY | 3);
    expect(performance.now() - start).toBeGreaterThan(15);
    host.close();
    addon.close(fd);
  });

  test('refuses what is no kvm_run mapping', () => {
    const host = new addon.RunHost();
    const small = mapMemory(64, abi.PROT_READ | abi.PROT_WRITE, anonymous, -1, 'testing');
    expect(() => host.attachVcpu(0, small, false)).toThrow(TypeError);
    host.close();
  });
});

describe('open-file-description locks', () => {
  test('exclude each other between open files, and go with the descriptor', () => {
    const path = join(mkdtempSync(join(tmpdir(), 'tsvisor-lock-')), 'file');
    writeFileSync(path, 'x');
    const open = () => addon.open(path, fsConstants.O_RDWR);
    const [one, two] = [open(), open()];
    const { EAGAIN } = constants.errno;
    expect(addon.ofdLock(one, false, false, 0, 100)).toBe(0);
    expect(addon.ofdLock(two, false, false, 50, 1)).toBe(0);
    expect(addon.ofdLock(two, true, true, 50, 1)).toBe(-EAGAIN);
    expect(addon.ofdLock(two, false, true, 50, 1)).toBe(-EAGAIN);
    expect(addon.ofdLock(two, true, true, 100, 0)).toBe(0);
    expect(addon.ofdLock(two, false, true, 100, 0)).toBe(0);
    expect(addon.ofdLock(one, true, false, 2 ** 40, 1)).toBe(-EAGAIN); // length 0 has no end
    addon.close(two);
    expect(addon.ofdLock(one, false, true, 0, 0)).toBe(0);
    addon.close(one);
    expect(addon.ofdLock(one, false, true, 0, 0)).toBe(-EBADF);
    const readOnly = addon.open(path, fsConstants.O_RDONLY);
    expect(addon.ofdLock(readOnly, false, true, 0, 0)).toBe(-EBADF);
    expect(addon.ofdLock(readOnly, true, true, 0, 0)).toBe(0);
    addon.close(readOnly);
    rmSync(path);
  });
});

describe('a terminated Worker', () => {
  test('leaves no descriptor, thread or mapping', async () => {
    const source = `
      const { createRequire } = require('node:module');
      const addon = createRequire(${JSON.stringify(`${process.cwd()}/x`)})('./addon/build/Release/tsvisor.node');
      for (let i = 0; i < 20; i++) { addon.eventfd(0); addon.timerfdCreate(); addon.socketpair(); addon.memfdCreate('t', 4096); }
      globalThis.kept = [new addon.RunHost(), new addon.RunHost(), new addon.Mapping(2 ** 20, 3, 0x22, -1, 0)];
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
    expect(resources().mappings).toBeLessThan(before.mappings + 60);
  });
});

describeKvm('KVM', () => {
  test('closes VMs on a thread of its own, which does not fall behind by more than a few', async () => {
    using kvm = Kvm.open();
    const open = () =>
      readdirSync('/proc/self/fd').filter((fd) => {
        try {
          return readlinkSync(`/proc/self/fd/${fd}`).includes('kvm-vm');
        } catch {
          return false; // that of the folder itself
        }
      }).length;
    for (let i = 0; i < 30; i++) {
      const vm = kvm.createVm();
      vm.createIrqchip(); // KVM takes some milliseconds to undo it
      vm[Symbol.dispose]();
      expect(open()).toBeLessThanOrEqual(9);
    }
    await expect.poll(open, { timeout: 20_000 }).toBe(0);
  });

  test('errors name the ioctl, the errno and the purpose', () => {
    using kvm = Kvm.open();
    using vm = kvm.createVm();
    vm.createIrqchip();
    expect(() => vm.createIrqchip()).toThrow(
      /^KVM_CREATE_IRQCHIP failed with EEXIST while creating the interrupt contr/,
    );
    using vcpu = vm.createVcpu(0);
    const sregs = vcpu.getSregs();
    sregs.cr4 = 1n << 63n;
    expect(() => vcpu.setSregs(sregs)).toThrow(
      expect.objectContaining({ code: 'ERR_KVM', errno: EINVAL, ioctl: 'KVM_SET_SREGS' }),
    );
  });

  test('what is not KVM is refused with its remedy', () => {
    expect(() => Kvm.open('/nonexistent/kvm')).toThrow(expect.objectContaining({ code: 'ERR_KVM_MISSING' }));
    expect(() => Kvm.open('/dev/null')).toThrow(expect.objectContaining({ code: 'ERR_KVM_UNSUPPORTED' }));
    expect(() => kvmIoctl(0, 'KVM_CREATE_IRQCHIP', abi.KVM_CREATE_IRQCHIP, 'testing')).toThrow(/E(NOTTY|BADF)/);
  });

  test('registers survive a round trip', () => {
    using kvm = Kvm.open();
    using vm = kvm.createVm();
    using vcpu = vm.createVcpu(0);
    const regs = vcpu.getRegs();
    for (let i = 0; i < 16; i++) regs.setGpr(i, 0x0101010101010101n * BigInt(i + 1));
    regs.rip = 0x12345n;
    vcpu.setRegs(regs);
    const back = vcpu.getRegs();
    expect([...back.words]).toEqual([...regs.words]);
    expect(back.gpr(4)).toBe(0x0505050505050505n);
    const sregs = vcpu.getSregs();
    sregs.setSegment('ds', { ...sregs.segment('ds'), base: 0x1000n, limit: 0xfffff, selector: 0x18 });
    vcpu.setSregs(sregs);
    expect(vcpu.getSregs().segment('ds')).toMatchObject({ base: 0x1000n, limit: 0xfffff, selector: 0x18 });
  });
});

describe('guest I/O', () => {
  const [READ, WRITE, FLUSH, PUNCH_HOLE, ZERO_RANGE] = [0, 1, 2, 3, 4];
  const page = 4096;
  const GAP = 0x10_0000;
  let folder: string;
  let file: number;
  /** Guest RAM: two regions that touch at 4 pages, and one after a gap. */
  let mappings: Mapping[];
  let ram: Uint8Array[];
  let io: NativeGuestIo;
  let host: RunHost;
  const order = new TransferOrder();

  const map = (length: number) => mapMemory(length, abi.PROT_READ | abi.PROT_WRITE, anonymous, -1, 'testing');
  const pattern = (length: number) => Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 8)) & 0xff);
  const fileBytes = () => readFileSync(join(folder, 'file'));
  const transferBy = (
    by: NativeGuestIo,
    fd: number,
    operation: number,
    offset: number,
    pairs: number[],
    prefix?: Uint8Array,
  ) => {
    order.set(operation, fd, offset, 0, Float64Array.from(pairs), pairs.length / 2, prefix);
    return by.transfer();
  };
  const transfer = (operation: number, offset: number, ...pairs: number[]) =>
    transferBy(io, file, operation, offset, pairs);
  const submit = (token: number, operation: number, offset: number, length: number, ...pairs: number[]) =>
    io.submit(token, operation, file, offset, length, Float64Array.from(pairs), pairs.length / 2);
  /** Waits as a run loop does. */
  const completions = (count: number): Map<number, number> => {
    const done = new Map<number, number>();
    const into = new Float64Array(2 * 7);
    for (let n = 0; done.size < count; ) {
      if (n < 7) expect(host.next()).toBe(READY | 5);
      n = io.completions(into);
      for (let i = 0; i < n; i++) {
        const token = into[2 * i] as number;
        if (done.has(token)) throw new Error(`operation ${token} completed twice`);
        done.set(token, into[2 * i + 1] as number);
      }
    }
    expect(io.completions(into)).toBe(0);
    return done;
  };
  const run = (operation: number, offset: number, length: number, ...pairs: number[]): number | undefined => {
    expect(submit(1, operation, offset, length, ...pairs)).toBe(0);
    return completions(1).get(1);
  };

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'tsvisor-io-'));
    file = openSync(join(folder, 'file'), 'w+');
    mappings = [map(4 * page), map(4 * page), map(4 * page)];
    ram = mappings.map(({ buffer }) => new Uint8Array(buffer));
    const regions = [0, 4 * page, GAP].map((gpa, i) => [gpa, mappings[i] as Mapping] as const);
    host = new addon.RunHost();
    io = new addon.GuestIo(regions, host, 5, order.words);
  });
  afterEach(() => {
    io.close();
    host.close();
    closeSync(file);
    rmSync(folder, { recursive: true });
  });

  test('moves bytes between a file and pieces of memory, over the edge of regions too', () => {
    const bytes = pattern(300);
    ram[0]?.set(bytes.subarray(0, 100), 4 * page - 100);
    ram[1]?.set(bytes.subarray(100, 150), 0);
    ram[2]?.set(bytes.subarray(150), 9);
    expect(transfer(WRITE, 5, 4 * page - 100, 150, GAP + 9, 150)).toBe(300);
    expect([...fileBytes()]).toEqual([0, 0, 0, 0, 0, ...bytes]);
    expect(transfer(READ, 5, GAP + page, 1, 4 * page - 50, 299)).toBe(300);
    expect(ram[2]?.[page]).toBe(bytes[0]);
    expect(ram[0]?.subarray(4 * page - 50)).toEqual(bytes.subarray(1, 51));
    expect(ram[1]?.subarray(0, 249)).toEqual(bytes.subarray(51));
    expect(transfer(READ, 300, 0, page)).toBe(5); // the end of the file
    expect(transfer(READ, 305, 0, page)).toBe(0);
  });

  test('puts a prefix of the host before the memory, and goes on where a stream is', () => {
    const bytes = pattern(20);
    ram[0]?.set(bytes);
    const prefix = Uint8Array.of(1, 2, 3);
    expect(transferBy(io, file, WRITE as number, -1, [0, 20], prefix)).toBe(23);
    expect(transferBy(io, file, WRITE as number, -1, [0, 2])).toBe(2);
    expect([...fileBytes()]).toEqual([1, 2, 3, ...bytes, 0, 7]);
    const longest = pattern(MAX_PREFIX);
    expect(transferBy(io, file, WRITE as number, 0, [0, 2], longest)).toBe(MAX_PREFIX + 2);
    expect([...fileBytes()]).toEqual([...longest, 0, 7]);
  });

  test('moves no more pieces at once than an order has, and says how far it has come', () => {
    ram[0]?.set(pattern(600));
    const pieces = Array.from({ length: 300 }, (_, i) => [2 * i, 1]).flat();
    expect(transfer(WRITE as number, 0, ...pieces)).toBe(MAX_PIECES);
    expect([...fileBytes()]).toEqual([...pattern(600)].filter((_, i) => i % 2 === 0 && i < 2 * MAX_PIECES));
  });

  test('refuses memory that the guest does not have, and touches nothing then', () => {
    writeSync(file, pattern(2 * page));
    const bad = [
      [8 * page, 1],
      [8 * page - 1, 2],
      [GAP - 1, 2],
      [GAP + 4 * page - 1, 2],
      [GAP + 4 * page, 1],
      [-1, 2],
      [0, -1],
      [0, 2 ** 53],
      [2 ** 53, 1],
      [2 ** 64, 1],
      [0, Number.POSITIVE_INFINITY],
      [Number.NaN, 1],
    ] as const;
    for (const pair of bad) {
      for (const operation of [READ, WRITE]) {
        expect(transfer(operation as number, 0, 0, 16, ...pair), `${pair}`).toBe(-EFAULT);
        expect(submit(1, operation as number, 0, 0, 0, 16, ...pair), `${pair}`).toBe(-EFAULT);
      }
    }
    expect(ram[0]?.subarray(0, 16)).toEqual(new Uint8Array(16));
    expect(fileBytes()).toEqual(Buffer.from(pattern(2 * page)));
  });

  test('refuses arguments that are none', () => {
    const pairs = Float64Array.of(0, 1);
    for (const [word, value] of [
      [0, FLUSH],
      [1, -2],
      [1, 2 ** 31],
      [2, Number.NaN],
      [2, 2 ** 63],
      [3, -1],
      [4, -1],
      [4, MAX_PIECES + 1],
      [4, Number.NaN],
      [5, 1], // a read has no prefix
    ] as const) {
      order.set(0, file, 0, 0, pairs, 1);
      order.words[word] = value as number;
      expect(() => io.transfer(), `${word}: ${value}`).toThrow(TypeError);
    }
    order.set(1, file, 0, 0, pairs, 1);
    order.words[5] = MAX_PREFIX + 1;
    expect(() => io.transfer()).toThrow(TypeError);
    expect(() => new addon.GuestIo([], host, 5, new Float64Array(5))).toThrow(TypeError);
    for (const offset of [-1, Number.NaN, 2 ** 63]) {
      expect(() => io.submit(1, 0, file, offset, 0, pairs, 1), `${offset}`).toThrow(TypeError);
      expect(() => io.submit(1, 2, file, 0, offset, pairs, 1), `${offset}`).toThrow(TypeError);
    }
    expect(() => io.submit(1, 7, file, 0, 0, pairs, 1)).toThrow(TypeError);
    expect(() => io.submit(1, 5, file, 0, 0, pairs, 0)).toThrow(TypeError); // copy has one pair
    for (const offset of [-1, Number.NaN, 2 ** 63]) {
      expect(() => io.submit(1, 5, file, 0, 1, Float64Array.of(file, offset), 1), `${offset}`).toThrow(TypeError);
    }
    const bytes = new Uint8Array(1);
    expect(() => io.submit(1, 0, file, 0, 0, pairs, 0, bytes)).toThrow(TypeError);
    expect(() => io.submit(1, 1, file, 0, 0, pairs, 1, bytes)).toThrow(TypeError);
    expect(() => io.submit(1, 1, file, 0, 0, pairs, 0, 5 as never)).toThrow(TypeError);
    expect(() => io.cancel(5 as never)).toThrow(TypeError);
    expect(() => io.submit(1, 0, file, 0, 0, pairs, 2)).toThrow(TypeError);
  });

  test('does the whole of an operation on a thread, however many pieces it has', () => {
    const bytes = pattern(3000);
    ram[0]?.set(bytes);
    const pieces = Array.from({ length: 3000 }, (_, i) => [2999 - i, 1]).flat();
    expect(run(WRITE as number, 0, 0, ...pieces)).toBe(3000);
    expect(fileBytes()).toEqual(Buffer.from(bytes).reverse());
    expect(run(READ as number, 0, 0, ...pieces.map((n, i) => (i % 2 ? n : GAP + n)))).toBe(3000);
    expect(ram[2]?.subarray(0, 3000)).toEqual(bytes);
    expect(run(READ as number, 2000, 0, ...pieces)).toBe(1000);
    expect(run(READ as number, 3000, 0, ...pieces)).toBe(0);
  });

  test('flushes, punches and zeroes without growing the file', () => {
    writeSync(file, pattern(4 * page));
    expect(run(FLUSH as number, 0, 0)).toBe(0);
    expect(run(PUNCH_HOLE as number, page, page)).toBe(0);
    expect(run(ZERO_RANGE as number, 3 * page - 1, page + 2)).toBe(0);
    const expected = pattern(4 * page);
    expected.fill(0, page, 2 * page);
    expected.fill(0, 3 * page - 1);
    expect(fileBytes()).toEqual(Buffer.from(expected));
    expect(run(PUNCH_HOLE as number, 0, 0)).toBe(-EINVAL);
  });

  test('reports what the host says of an operation', () => {
    const closed = openSync(join(folder, 'file'), 'r');
    expect(io.submit(1, 1, closed, 0, 0, Float64Array.of(0, 1), 1)).toBe(0);
    expect(completions(1).get(1)).toBe(-EBADF);
    closeSync(closed);
    expect(transferBy(io, closed, 0, 0, [0, 1])).toBe(-EBADF);
  });

  test('completes each of many operations once, on a few threads', () => {
    const count = 500;
    ftruncateSync(file, count * 16);
    const before = resources().threads;
    for (let i = 0; i < count; i++) {
      ram[0]?.fill(i & 0xff, 16 * i, 16 * i + 16);
      expect(submit(i, WRITE as number, i * 16, 0, 16 * i, 16)).toBe(0);
    }
    const done = completions(count);
    expect([...done.values()].every((result) => result === 16)).toBe(true);
    expect(resources().threads).toBeLessThanOrEqual(before + 8);
    expect(fileBytes()).toEqual(Buffer.from(Uint8Array.from({ length: count * 16 }, (_, i) => (i >> 4) & 0xff)));
  });

  test('writes bytes of the host, of which it takes a copy', () => {
    const bytes = pattern(100_000);
    expect(io.submit(1, WRITE as number, file, 3, 0, Float64Array.of(), 0, bytes)).toBe(0);
    const expected = Buffer.concat([Buffer.alloc(3), bytes]);
    bytes.fill(0);
    expect(completions(1).get(1)).toBe(100_000);
    expect(fileBytes()).toEqual(expected);
    expect(io.submit(1, WRITE as number, file, 0, 0, Float64Array.of(), 0, new Uint8Array())).toBe(0);
    expect(completions(1).get(1)).toBe(0);
  });

  test('copies from one file to another, as far as the first goes', () => {
    const other = openSync(join(folder, 'other'), 'w+');
    const bytes = pattern(200_000);
    writeSync(other, bytes);
    const copy = (from: number, offset: number, length: number) => {
      expect(io.submit(1, 5, file, offset, length, Float64Array.of(other, from), 1)).toBe(0);
      return completions(1).get(1);
    };
    expect(copy(10, 5, 150_000)).toBe(150_000);
    expect(fileBytes()).toEqual(Buffer.concat([Buffer.alloc(5), bytes.subarray(10, 150_010)]));
    expect(copy(190_000, 0, 20_000)).toBe(10_000);
    expect(copy(200_000, 0, 1)).toBe(0);
    expect(copy(0, 0, 0)).toBe(0);
    closeSync(other);
    const writeOnly = openSync(join(folder, 'other'), 'a');
    expect(io.submit(1, 5, file, 0, 1, Float64Array.of(writeOnly, 0), 1)).toBe(0);
    expect(completions(1).get(1)).toBe(-EBADF);
    closeSync(writeOnly);
  });

  test('cancel ends those that no thread has begun, no others', () => {
    // Long ones for every thread; then those that wait.
    const long = Array.from({ length: 1000 }, () => [0, 4 * page]).flat();
    for (let i = 0; i < 16; i++) submit(1000 + i, WRITE as number, 0, 0, ...long);
    for (let i = 0; i < 100; i++) submit(i, WRITE as number, 0, 0, 0, 1);
    io.cancel(Float64Array.from({ length: 50 }, (_, i) => 2 * i));
    const done = completions(116);
    for (const [token, result] of done) {
      if (token >= 1000) expect(result).toBe(4000 * page);
      else expect(result, `${token}`).toBe(token % 2 ? 1 : -ECANCELED);
    }
    expect(run(FLUSH as number, 0, 0)).toBe(0);
  });

  test('close waits for what has begun and keeps nothing; memory stays mapped as long', async () => {
    const before = resources();
    const own = map(64 * page);
    const busy = new addon.GuestIo([[0, own]], host, 6, order.words);
    const pairs = Float64Array.from(Array.from({ length: 100 }, () => [0, 64 * page]).flat());
    for (let i = 0; i < 16; i++) busy.submit(i, 1, file, 0, 0, pairs, 100);
    own.unmap();
    busy.close();
    busy.close();
    await expectNoMoreThan(before);
    expect(busy.submit(1, 2, file, 0, 0, pairs, 0)).toBe(-EBADF);
    expect(busy.submit(1, 1, file, 0, 0, pairs, 1)).toBe(-EFAULT);
    expect(transferBy(busy, file, 1, 0, [0, 1])).toBe(-EFAULT);
    expect(busy.completions(new Float64Array(2))).toBe(0);
    busy.cancel(Float64Array.of(1));
    expect(fstatSync(file).size % (64 * page)).toBe(0);
  });

  test('has its memory for itself: only then it can be renewed, which leaves zeros under the same buffer', () => {
    const own = map(2 * page);
    const { buffer } = own;
    const bytes = new Uint8Array(buffer);
    bytes.fill(7);
    const user = new addon.GuestIo([[0, own]], host, 6, order.words);
    expect(own.renew()).toBe(-EBUSY);
    expect(bytes[page]).toBe(7);
    user.close();
    expect(own.mapOver(page, page, file, 0)).toBe(0);
    expect(own.renew()).toBe(0);
    expect(bytes.every((byte) => byte === 0)).toBe(true);
    expect(own.buffer).toBe(buffer);
    own.unmap();
    expect(own.renew()).toBe(-EBADF);
  });

  test('fails an operation for which the host has no thread', () => {
    const source = `
      const { createRequire } = require('node:module');
      const { execFileSync } = require('node:child_process');
      const addon = createRequire(${JSON.stringify(`${process.cwd()}/x`)})('./addon/build/Release/tsvisor.node');
      const io = new addon.GuestIo([[0, new addon.Mapping(4096, 3, 0x22, -1, 0)]], new addon.RunHost(), 0, new Float64Array(1000));
      const into = new Float64Array(4);
      if (process.getuid() === 0) process.setuid(65534); // the limit is not for root
      execFileSync('prlimit', ['--pid', String(process.pid), '--nproc=1']);
      const results = [io.submit(7, 2, 1, 0, 0, into, 0), io.submit(8, 1, 1, 0, 0, into, 0)];
      const count = io.completions(into);
      process.stdout.write([...results, count, ...into].join(' '));
      io.close();`;
    const output = execFileSync(process.execPath, ['-e', source], { encoding: 'utf8' });
    const { EAGAIN } = constants.errno;
    expect(output).toBe(`0 0 2 7 ${-EAGAIN} 8 ${-EAGAIN}`);
  });

  test('a terminated Worker leaves no thread, whatever is under way', async () => {
    const source = `
      const { createRequire } = require('node:module');
      const addon = createRequire(${JSON.stringify(`${process.cwd()}/x`)})('./addon/build/Release/tsvisor.node');
      const io = globalThis.kept = new addon.GuestIo([[0, new addon.Mapping(2 ** 20, 3, 0x22, -1, 0)]], new addon.RunHost(), 0, new Float64Array(1000));
      for (let i = 0; i < 20; i++) io.submit(i, 1, ${file}, 0, 0, Float64Array.of(0, 2 ** 20), 1);
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
  });
});
