import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test, vi } from 'vitest';
import { footprint } from '../bench/footprint.js';
import { loadWarning } from '../bench/host.js';
import { interleave, whoCan } from '../bench/interleave.js';
import { peersUntil, timeUntil } from '../bench/peers.js';
import { type Measurement, median, quantile, rowOf, tableOf } from '../bench/result.js';
import { compare, type Vmm } from '../bench/virtio-guest.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const measurement: Measurement = {
  name: 'PIO write, CPL0',
  unit: 'us',
  better: 'lower',
  tsvisor: [11, 10.5, 100],
  peers: { c: [10, 9, 11], qemu: [22.000001] },
};

describe('statistics', () => {
  test('the median is in the middle, and between the two middle ones of an even count', () => {
    expect(median([3, 1, 2])).toBe(2);
    expect(median([4, 1, 3, 2])).toBe(2.5);
    expect(median([7])).toBe(7);
    expect(() => median([])).toThrow(RangeError);
  });

  test('quantiles are interpolated and leave the samples as they are', () => {
    const samples = [4, 0, 2];
    expect(quantile(samples, 0.25)).toBe(1);
    expect(quantile(samples, 0)).toBe(0);
    expect(quantile(samples, 1)).toBe(4);
    expect(samples).toEqual([4, 0, 2]);
  });
});

describe('reports', () => {
  test('a row has medians, and ratios of tsvisor over each peer', () => {
    expect(rowOf(measurement)).toEqual({
      name: 'PIO write, CPL0',
      unit: 'us',
      better: 'lower',
      tsvisor: 11,
      peers: { c: 10, qemu: 22 },
      ratio: { c: 1.1, qemu: 0.5 },
      quartiles: { tsvisor: [10.75, 55.5], c: [9.5, 10.5], qemu: [22, 22] },
    });
  });

  test('a peer that is absent is in neither peers nor ratio', () => {
    expect(rowOf({ ...measurement, peers: {} })).toMatchObject({ peers: {}, ratio: {} });
  });

  test('there is no ratio to a peer that takes nothing', () => {
    expect(rowOf({ ...measurement, peers: { c: [0] } })).toMatchObject({ peers: { c: 0 }, ratio: {} });
  });

  test('why a peer is absent is said once, with the rows that miss it', () => {
    const absent = { firecracker: 'no VMX' };
    expect(rowOf({ ...measurement, absent })).toMatchObject({ absent });
    const table = tableOf([{ ...measurement, absent }, measurement, { ...measurement, name: 'other', absent }]);
    expect(table.split('\n').slice(4)).toEqual(['no firecracker (no VMX): PIO write, CPL0; other', '']);
  });

  test('a table has a line for each measurement and a dash where a peer is absent', () => {
    const lines = tableOf([measurement, { ...measurement, name: 'other', peers: { c: [1] } }]).split('\n');
    expect(lines[0]).toMatch(/^ +unit +tsvisor +c +qemu +to c +to qemu$/);
    expect(lines[1]).toMatch(/^PIO write, CPL0 .* 11 \[10\.75 \.\. 55\.5\] .* 1\.100 x +0\.500 x$/);
    expect(lines[2]).toMatch(/^other .* - +11\.000 x +-$/);
  });
});

test('contestants take turns, another one first in each round', async () => {
  const order: string[] = [];
  const turn = (name: string) => () => {
    order.push(name);
    return [order.length];
  };
  const samples = await interleave(3, { a: turn('a'), b: turn('b') });
  expect(order.join('')).toBe('abbaab');
  expect(samples).toEqual({ a: [1, 4, 5], b: [2, 3, 6] });
});

test('who fails when it is tried is left out, with its reason', async () => {
  const fine = () => 1;
  const broken = () => Promise.reject(new Error('there is no /dev/kvm'));
  const { able, absent } = await whoCan({ qemu: fine, kvmtool: broken });
  expect(able).toEqual({ qemu: fine });
  expect(absent).toEqual({ kvmtool: 'there is no /dev/kvm' });
});

describe('a peer that boots a guest', () => {
  const peer = (script: string) => timeUntil(/\/ # $/, 'sh', ['-c', script]);

  test('is timed until the prompt, and ended', async () => {
    expect(await peer('printf "/ # then / #"; printf " "; exec sleep 600')).toBeGreaterThan(0);
  });

  test('fails in its own words', async () => {
    await expect(peer('echo "this needs VMX" >&2; exit 1')).rejects.toThrow(/^this needs VMX$/);
    await expect(peer('echo "KVM internal error. Suberror: 1" >&2; exec sleep 600')).rejects.toThrow('Suberror: 1');
    await expect(peer('exit 3')).rejects.toThrow('it ends with code 3');
    await expect(timeUntil(/x/, 'tsvisor-no-such-program', [])).rejects.toThrow('ENOENT');
  });
});

describe('peers that are looked for on PATH', () => {
  const folder = temporaryFolder();
  const unable = temporaryFolder();
  const install = (name: string, script: string, where = folder) => {
    writeFileSync(join(where, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  };
  const guest = { kernel: '/k', initrd: '/i', append: 'console=ttyS0 quiet', memory: 64 };
  const peers = (path: string) => {
    vi.stubEnv('PATH', path);
    return peersUntil(/\/ # /, guest);
  };
  afterEach(() => {
    vi.unstubAllEnvs();
  });

  test('get the guest: Firecracker by a file, kvmtool by options', async () => {
    install(
      'firecracker',
      `[ "$1 $2" = "--no-api --config-file" ] && cp "$3" ${join(folder, 'config')} && echo "/ # "`,
    );
    install('lkvm', `echo "$@" > ${join(folder, 'options')}; echo "/ # "`);
    const { firecracker, kvmtool } = peers(`${folder}:${process.env.PATH}`);
    expect(await firecracker()).toBeGreaterThan(0);
    expect(JSON.parse(readFileSync(join(folder, 'config'), 'utf8'))).toMatchObject({
      'boot-source': { kernel_image_path: '/k', initrd_path: '/i', boot_args: 'console=ttyS0 quiet' },
      'machine-config': { vcpu_count: 1, mem_size_mib: 64 },
    });
    expect(await kvmtool()).toBeGreaterThan(0);
    expect(readFileSync(join(folder, 'options'), 'utf8')).toMatch(
      /^run .*--mem 64 .*--kernel \/k --initrd \/i --params console=ttyS0 quiet$/m,
    );
  });

  test('that cannot run say why', async () => {
    install('firecracker', 'echo "this host has no VMX" >&2; exit 1', unable);
    const { able, absent } = await whoCan(peers(unable));
    expect(able).toEqual({});
    expect(absent.firecracker).toBe('this host has no VMX');
    expect((await whoCan(peers('/nowhere'))).absent.kvmtool).toBe('it is not installed');
  });
});

test('the footprint of processes is the sum of theirs', () => {
  const one = footprint([process.pid]);
  expect(one.pss).toBeGreaterThan(0);
  expect(one.descriptors).toBeGreaterThan(2);
  expect(one.cpu).toBeGreaterThan(0);
  expect(one.guestPss).toBe(0);
  expect(footprint([process.pid, process.pid]).threads).toBeGreaterThan(one.threads);
});

describe('the virtio bench', () => {
  const workload = { name: 'w', unit: 'MB/s', weight: 0.5, bench: 'blk-read', depth: 4, size: 4096 };
  /** A VMM whose guest does so many operations in each million ticks, five times. */
  const guest = (operations: number): Vmm & { readonly words: string[] } => {
    const words: string[] = [];
    const segments = `segment ${operations} 1000000\r\n`.repeat(5);
    const run = (text: string) => {
      words.push(text);
      return Promise.resolve(`${segments}total ${operations * 6}\r\n`);
    };
    return Object.assign(run, { words });
  };

  test('of each VMM the configuration with the best median counts, and one that fails is told of', async () => {
    const notes: string[] = [];
    const note = (text: string) => void notes.push(text);
    const [inline, threads] = [guest(25), guest(30)];
    const tsvisor = { inline, threads };
    const broken = () => Promise.reject(new Error('no such option'));
    const qemu = { slow: guest(10), quick: guest(20), broken };
    const measured = await compare(workload, { tsvisor, qemu }, 2e6, { rounds: 2, note });
    expect(measured).toEqual({
      ...{ name: 'w', unit: 'MB/s', better: 'higher' },
      tsvisor: Array(10).fill(30), // 30 a million ticks, 2 million ticks a second, 0.5 MB each
      peers: { qemu: Array(10).fill(20) },
    });
    expect(notes).toEqual([
      'w: no QEMU with broken: no such option',
      'w: tsvisor threads 30; inline 25 MB/s',
      'w: qemu quick 20; slow 10 MB/s',
    ]);
    const warmedUp = 'bench=blk-read depth=4 size=4096 warmup=8000000 segment=80000 segments=5';
    for (const { words } of [inline, threads]) expect(words).toEqual([warmedUp, warmedUp]);
  });

  test('what surrounds a run may correct it', async () => {
    const options = { rounds: 1, note: () => {} };
    const { tsvisor, peers } = await compare(
      workload,
      { tsvisor: { one: guest(30) }, qemu: {} },
      2e6,
      options,
      async (run) => {
        const { rates, total } = await run();
        return { total, rates: rates.map((rate) => rate / total) };
      },
    );
    expect(tsvisor).toEqual(Array(5).fill((60 / 180) * 0.5));
    expect(peers).toEqual({});
  });

  test('a guest that prints something else is an error', async () => {
    const mute = () => Promise.resolve('error: the device lacks a queue\n');
    const options = { rounds: 1, note: () => {} };
    await expect(compare(workload, { tsvisor: { mute }, qemu: {} }, 2e6, options)).rejects.toThrow('lacks a queue');
  });
});

test('a busy host is warned of', () => {
  const host = { cpu: '', cores: 4, kernel: '', kvm: '', node: '', load: [2, 9, 9] };
  expect(loadWarning(host)).toBeUndefined();
  expect(loadWarning({ ...host, load: [2.1, 0, 0] })).toContain('2.1');
});
