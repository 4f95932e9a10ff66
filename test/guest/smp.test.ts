import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Machine } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
const disk = join(folder, 'disk.img');
const program = join(folder, 'parallel');
const BOOT = 600_000;
const OPERATION = 300_000;
const ROUNDS = 20_000_000;

/** State of the generator of parallel.c after n rounds from x: its step composed with itself, by squaring. */
function computed(x: number, n: number): string {
  let state = BigInt(x);
  let [factor, term] = [6364136223846793005n, 1442695040888963407n];
  for (let rounds = n; rounds > 0; rounds = Math.floor(rounds / 2)) {
    if (rounds % 2 === 1) state = BigInt.asUintN(64, state * factor + term);
    [factor, term] = [BigInt.asUintN(64, factor * factor), BigInt.asUintN(64, (factor + 1n) * term)];
  }
  return String(state);
}

const numbers = (count: number) => Array.from({ length: count }, (_, n) => n);
const mask = (cpu: number) => (1 << cpu).toString(16);

/** What a shell's command prints. */
async function run(machine: Machine, command: string): Promise<string> {
  const { code, stdout, stderr } = await machine.exec(command, { timeout: OPERATION });
  expect({ code, stderr }, command).toEqual({ code: 0, stderr: '' });
  return stdout.trim();
}

/** One of `/proc/cpuinfo`'s fields for each CPU. */
const field = (cpuinfo: string, name: string) =>
  [...cpuinfo.matchAll(new RegExp(`^${name}\\s*: (.*)$`, 'gm'))].map(([, value]) => Number(value));

/** On each CPU a process that is pinned to it; what parallel.c says goes to /tmp/job and the CPU's number. */
const jobs = (cpus: number, rounds: number) =>
  `${numbers(cpus)
    .map((cpu) => `taskset ${mask(cpu)} /tmp/parallel 1 ${rounds} >/tmp/job${cpu} &`)
    .join(' ')} wait`;

async function checkJobs(machine: Machine, cpus: number, rounds: number): Promise<void> {
  for (const cpu of numbers(cpus)) {
    expect((await run(machine, `cat /tmp/job${cpu}`)).split('\n')[1]).toBe(`${computed(0, rounds)} ${cpu}`);
  }
}

beforeAll(() => {
  writeFileSync(disk, '');
  truncateSync(disk, 2 ** 20);
  execFileSync('musl-gcc', ['-O2', '-static', '-s', '-o', program, 'test/guest/programs/parallel.c']);
});

describeKvm.each([1, 2, 4])('the default guest with %i vCPUs', (cpus) => {
  let machine: Machine;
  beforeAll(async () => {
    machine = await Machine.create({ cpus, drives: [{ file: disk }] });
    await machine.start();
    await machine.ready({ timeout: BOOT });
    await machine.fs.writeFile('/tmp/parallel', readFileSync(program), { mode: 0o755 });
  }, BOOT);
  afterAll(() => machine?.close());

  it('has them all, as the cores of one package', { timeout: OPERATION }, async () => {
    expect(await run(machine, 'nproc')).toBe(String(cpus));
    const cpuinfo = await run(machine, 'cat /proc/cpuinfo');
    expect(field(cpuinfo, 'processor')).toEqual(numbers(cpus));
    if (cpus === 1) return; // what is told of a package, a kernel without SMP does not say
    const all = (value: number) => numbers(cpus).map(() => value);
    expect(field(cpuinfo, 'apicid')).toEqual(numbers(cpus));
    expect(field(cpuinfo, 'initial apicid')).toEqual(numbers(cpus));
    expect(field(cpuinfo, 'core id')).toEqual(numbers(cpus));
    expect(field(cpuinfo, 'physical id')).toEqual(all(0));
    expect(field(cpuinfo, 'siblings')).toEqual(all(cpus));
    expect(field(cpuinfo, 'cpu cores')).toEqual(all(cpus));
  });

  it('computes on each', { timeout: OPERATION }, async () => {
    for (const cpu of numbers(cpus)) {
      const [, result] = (await run(machine, `taskset ${mask(cpu)} /tmp/parallel 1 ${ROUNDS}`)).split('\n');
      expect(result).toBe(`${computed(0, ROUNDS)} ${cpu}`);
    }
  });

  if (cpus > 1) {
    it('takes a device’s interrupts on each', { timeout: OPERATION }, async () => {
      const line = async () => {
        const lines = (await run(machine, 'cat /proc/interrupts')).split('\n');
        const [irq, counts = ''] = lines.find((text) => text.endsWith('virtio0'))?.split(':') ?? [];
        return { irq: Number(irq), counts: counts.trim().split(/\s+/).slice(0, cpus).map(Number) };
      };
      for (const cpu of numbers(cpus)) {
        const before = await line();
        await run(machine, `echo ${mask(cpu)} >/proc/irq/${before.irq}/smp_affinity`);
        // The first may still come where they came before.
        for (const _ of [1, 2])
          await run(machine, 'dd if=/dev/vda of=/dev/null bs=4096 count=8 iflag=direct 2>/dev/null');
        expect((await line()).counts[cpu]).toBeGreaterThan(before.counts[cpu] as number);
      }
    });
  }

  if (cpus === 2) {
    it('computes on both at once', { timeout: OPERATION }, async () => {
      await run(machine, jobs(cpus, ROUNDS));
      await checkJobs(machine, cpus, ROUNDS);
      const [, ...shares] = (await run(machine, `/tmp/parallel ${cpus} ${cpus * ROUNDS}`)).split('\n');
      expect(shares.map((share) => share.split(' ')[0])).toEqual(numbers(cpus).map((n) => computed(n, ROUNDS)));
    });

    it('goes on from a snapshot that was taken while both compute', { timeout: OPERATION }, async () => {
      const long = 20 * ROUNDS;
      await machine.spawn(`rm /tmp/job*; { ${jobs(cpus, long)}; }; touch /tmp/done`, { detached: true });
      await machine.snapshot(join(folder, 'snapshot'));
      await using restored = await Machine.restore(join(folder, 'snapshot'));
      await restored.resume();
      const done = () =>
        restored.fs.stat('/tmp/done').then(
          () => true,
          () => false,
        );
      await expect.poll(done, { timeout: OPERATION, interval: 500 }).toBe(true);
      await checkJobs(restored, cpus, long);
      expect(await run(restored, 'nproc')).toBe('2');
    });

    it('panics on the second', { timeout: OPERATION }, async () => {
      await using restored = await Machine.restore(join(folder, 'snapshot'));
      const end = restored.wait();
      await restored.resume();
      await restored.spawn(`taskset 2 sh -c 'echo c >/proc/sysrq-trigger'`, { detached: true }).catch(() => {});
      expect(await end).toMatchObject({ reason: 'guest-panic' });
    });

    it('boots again with both after a reset by the second', { timeout: BOOT }, async () => {
      const reset = once(machine, 'reset');
      await machine.spawn('taskset 2 reboot -f', { detached: true });
      await reset;
      await machine.ready({ timeout: BOOT });
      expect(await run(machine, 'nproc')).toBe('2');
    });
  }

  it('powers off', { timeout: OPERATION }, async () => {
    expect(await machine.stop({ graceful: true, timeout: OPERATION })).toMatchObject({ reason: 'guest-shutdown' });
  });
});
