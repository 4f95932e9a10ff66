import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { describe, expect, test } from 'vitest';
import { addon, READY } from '#dist/kvm/addon.js';
import * as abi from '#dist/kvm/generated/abi.js';
import { Kvm, kvmIoctl, mapMemory } from '#dist/kvm/kvm.js';
import { describeKvm } from '../support/kvm.js';
import { resources } from '../support/process-resources.js';

const { EBADF, EINVAL } = constants.errno;
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
    expect(() => host.attachVcpu(0, small)).toThrow(TypeError);
    host.close();
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
    const after = resources();
    expect(after.descriptors).toBe(before.descriptors);
    expect(after.threads).toBe(before.threads);
    expect(after.mappings).toBeLessThan(before.mappings + 60);
  });
});

describeKvm('KVM', () => {
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
