import { type HeapProfiler, Session } from 'node:inspector';
import { expect, test } from 'vitest';
import { layout } from '#dist/machine/layout.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { Rig } from '../support/snapshot/rig.js';

const PORT = 0x510;
/** Above 2^31, where a number is not a small integer any more. */
const MMIO = layout.virtioMmioBase;

/** Of a profile. Several are taken, since V8 compiles what the exits run through when it gets around to that. */
const EXITS = 20_000;
const PROFILES = 40;
const FOREVER = 1e9;

const GUEST = `
  mov rbx, ${MMIO}
  mov edx, ${PORT}
again:
  out dx, al
  in eax, dx
  mov [rbx], eax
  mov rax, [rbx + 8]
  jmp again
`;

/** A device that only counts. */
class Counter {
  readonly name = 'counter';
  count = 0;

  read(): void {
    this.count++;
  }

  write(): void {
    this.count++;
  }
}

/** Bytes that the program's functions, and V8's own that they call, have allocated below `turn`. */
function allocated(node: HeapProfiler.SamplingHeapProfileNode, inLoop = false, byOurs = false): Map<string, number> {
  const { functionName, url, lineNumber } = node.callFrame;
  const isOurs = url.includes('/dist/') || (url === '' && byOurs);
  const below = inLoop || (isOurs && functionName === 'turn');
  const found = new Map<string, number>();
  const add = (name: string, bytes: number) => found.set(name, (found.get(name) ?? 0) + bytes);
  if (below && isOurs && node.selfSize > 0) {
    add(`${functionName} (${url.split('/').pop()}:${lineNumber + 1})`, node.selfSize);
  }
  for (const child of node.children) {
    for (const [name, bytes] of allocated(child, below, isOurs)) add(name, bytes);
  }
  return found;
}

/** Runs something and tells what functions allocated in it below `turn`, whether or not it was collected since. */
function profiled(run: () => void): Map<string, number> {
  const session = new Session();
  session.connect();
  session.post('HeapProfiler.startSampling', {
    samplingInterval: 64,
    includeObjectsCollectedByMajorGC: true,
    includeObjectsCollectedByMinorGC: true,
  } as HeapProfiler.StartSamplingParameterType);
  run();
  let profile: HeapProfiler.SamplingHeapProfile | undefined;
  session.post('HeapProfiler.stopSampling', (_, result) => {
    profile = result.profile;
  });
  session.disconnect();
  if (!profile) throw new Error('there is no profile');
  return allocated(profile.head);
}

describeKvm('the hot loop', () => {
  test('allocates nothing for a port or MMIO exit, by a heap profile', async () => {
    using rig = await Rig.create(guestProgram(GUEST), 4 * 2 ** 20);
    const ports = new Counter();
    const mmio = new Counter();
    rig.machine.ports.add(PORT, 4, ports);
    rig.machine.mmio.add(MMIO, 16, mmio);
    const exits = () => ports.count + mmio.count;

    let functions = new Map<string, number>();
    let bytes = Number.POSITIVE_INFINITY; // for each exit
    for (let taken = 0; taken < PROFILES && bytes >= 0.1; taken++) {
      const before = exits();
      functions = profiled(() => rig.run(FOREVER, () => exits() - before >= EXITS));
      bytes = [...functions.values()].reduce((sum, size) => sum + size, 0) / (exits() - before);
    }
    expect(Math.min(ports.count, mmio.count)).toBeGreaterThan(EXITS / 3);
    expect(bytes, [...functions.keys()].join(', ')).toBeLessThan(0.1);
  });
});
