import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Machine, SharedThread } from '#dist/index.js';
import { describeKvm } from '../support/kvm.js';
import { resources } from '../support/process-resources.js';
import { temporaryFolder } from '../support/temporary-folder.js';

const folder = temporaryFolder();
const HOUR = 3_600_000;
const CLONES = Number(process.env.TSVISOR_CASES ?? 500);
const MiB = 2 ** 20;

/** Of this process and the host: what a clone takes, and what of it is limited. */
function memory(): string {
  const text = readFileSync('/proc/self/smaps_rollup', 'latin1');
  const of = (name: string) => Math.round(Number(new RegExp(`^${name}:\\s*(\\d+)`, 'm').exec(text)?.[1]) / 1024);
  const free = Number(/MemAvailable:\s*(\d+)/.exec(readFileSync('/proc/meminfo', 'latin1'))?.[1]) * 1024;
  const { descriptors, threads, mappings } = resources();
  return (
    `RSS ${of('Rss')} MiB, PSS ${of('Pss')} MiB, ${descriptors} descriptors, ${threads} threads, ` +
    `${mappings} mappings; ${Math.round(free / MiB)} MiB available on the host`
  );
}

describeKvm(`${CLONES} clones of one snapshot`, () => {
  const snapshot = join(folder, 'snapshot');
  const thread = new SharedThread();
  const clones: Machine[] = [];

  beforeAll(async () => {
    await using machine = await Machine.create();
    await machine.start();
    await machine.ready();
    // Until init has made its links, which each clone would make again.
    await machine.exec('while [ -e /etc/applets ]; do sleep 0.2; done; echo cloned > /tmp/origin', { timeout: HOUR });
    await machine.snapshot(snapshot);
  }, HOUR);
  afterAll(() => thread.close());

  it('are alive at once, and each answers', { timeout: 2 * HOUR }, async () => {
    // biome-ignore lint/suspicious/noConsole: what such a test is run for
    const say = (text: string) => console.log(`${text}: ${memory()}`);
    say('before');
    while (clones.length < CLONES) {
      const clone = await Machine.restore(snapshot, { thread });
      clones.push(clone);
      await clone.resume();
      await clone.ready({ timeout: HOUR });
      if (clones.length % 100 === 0) say(`${clones.length} run`);
    }
    for (const [index, clone] of clones.entries()) {
      const { stdout } = await clone.exec(`cat /tmp/origin; echo ${index} > /tmp/own`, { timeout: HOUR });
      expect(stdout).toBe('cloned\n');
    }
    say('each has run a command');
    for (const [index, clone] of clones.entries()) {
      expect((await clone.exec('cat /tmp/own')).stdout).toBe(`${index}\n`);
      expect(clone.state).toBe('running');
    }
  });
});
