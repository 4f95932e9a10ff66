import { afterAll, expect, test } from 'vitest';
import { loadKernel } from '#dist/boot/load.js';
import { TsvisorError } from '#dist/errors.js';
import {
  buildBzImage,
  buildElf,
  ImageDirectory,
  linuxNote,
  MiB,
  pack,
  pattern,
  pvhNote,
  ram,
  randomIntegers,
} from '../../support/boot-images.js';

const directory = new ImageDirectory();
afterAll(() => directory.dispose());

const MUTATIONS = 2000;
const LOW_FORBIDDEN = { start: 0xa0000, end: MiB };

function seedImages(): Buffer[] {
  const segments = [
    { paddr: 2 * MiB, data: pattern(3000) },
    { paddr: 2 * MiB + 8192, data: pattern(500, 2), memsz: 9000 },
  ];
  const linux = buildElf({ segments, notes: [pvhNote(2 * MiB), linuxNote] });
  const small = { prefAddress: 2n * BigInt(MiB), initSize: MiB };
  return [
    linux,
    buildElf({ segments, notes: [pvhNote(2 * MiB)] }),
    buildElf({ bits: 32, segments, notes: [pvhNote(2 * MiB, 4)] }),
    buildBzImage({ payload: pattern(2000), ...small }),
    ...(['gzip', 'lz4', 'zstd', 'xz'] as const).map((f) => buildBzImage({ payload: pack(f, linux), ...small })),
  ];
}

/** Flips, overwrites and cuts; mostly near the start, where the headers are. */
function mutate(image: Buffer, random: (bound: number) => number): Buffer {
  let bytes = Buffer.from(image);
  const interesting = [0, 1, 0x7f, 0x80, 0xff];
  for (let n = 1 + random(4); n > 0; n--) {
    const at = random(random(3) === 0 ? bytes.length : Math.min(bytes.length, 0x280));
    switch (random(4)) {
      case 0:
        bytes[at] = (bytes[at] as number) ^ (1 << random(8));
        break;
      case 1:
        bytes[at] = interesting[random(interesting.length)] as number;
        break;
      case 2:
        bytes.fill(random(2) ? 0xff : random(256), at, Math.min(bytes.length, at + 1 + random(8)));
        break;
      default:
        if (random(4) === 0) bytes = bytes.subarray(0, 1 + random(bytes.length));
    }
    if (bytes.length < 2) break;
  }
  return bytes;
}

test(`${MUTATIONS} damaged images load or are refused, and only RAM is written`, async () => {
  const seeds = seedImages();
  const random = randomIntegers(20240607);
  const memory = ram(4 * MiB);
  const forbidden = memory.slice(LOW_FORBIDDEN.start, LOW_FORBIDDEN.end - LOW_FORBIDDEN.start);
  const initrd = directory.file('initrd', pattern(5000));
  let loaded = 0;
  for (let i = 0; i < MUTATIONS; i++) {
    const image = mutate(seeds[i % seeds.length] as Buffer, random);
    const kernel = directory.file('kernel', image);
    memory.zero(0, memory.size);
    forbidden.fill(0xa5);
    const started = performance.now();
    try {
      const entry = await loadKernel(memory, { kernel, initrd, commandLine: 'quiet' });
      loaded++;
      expect(entry.rip).toBeLessThan(memory.size);
      expect(Buffer.compare(memory.slice(entry.initrd?.start ?? 0, 5000), pattern(5000))).toBe(0);
    } catch (error) {
      if (!(error instanceof TsvisorError)) throw new Error(`image ${i}`, { cause: error });
      expect(error.message).not.toContain('\n');
    }
    if (!forbidden.every((byte) => byte === 0xa5)) expect.unreachable(`image ${i} wrote where there is no RAM`);
    expect(performance.now() - started, `image ${i}`).toBeLessThan(5000);
  }
  // Both outcomes have to be common for this to test anything.
  expect(loaded).toBeGreaterThan(MUTATIONS / 10);
  expect(loaded).toBeLessThan(MUTATIONS * 0.9);
});
