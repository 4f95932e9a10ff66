import { MemoryError } from '../errors.js';
import type { Mapping } from '../kvm/addon.js';
import {
  MADV_HUGEPAGE,
  MAP_ANONYMOUS,
  MAP_NORESERVE,
  MAP_PRIVATE,
  PROT_READ,
  PROT_WRITE,
} from '../kvm/generated/abi.js';
import { mapMemory } from '../kvm/kvm.js';
import type { VmFd } from '../kvm/vm.js';
import { GuestMemory } from '../memory/guest-memory.js';
import { layout } from './layout.js';

/** Node's ArrayBuffers end at 4 GiB; half of it keeps every offset a small number to the compiler. */
const MAX_REGION = 2 ** 31;

/** Guest RAM below and above the MMIO hole, in pieces of at most 2 GiB. */
export function ramRanges(size: number): { gpa: number; size: number }[] {
  const low = Math.min(size, layout.mmioHoleStart);
  const ranges: { gpa: number; size: number }[] = [];
  for (const [start, length] of [
    [0, low],
    [layout.mmioHoleEnd, size - low],
  ] as const) {
    for (let done = 0; done < length; done += MAX_REGION) {
      ranges.push({ gpa: start + done, size: Math.min(MAX_REGION, length - done) });
    }
  }
  return ranges;
}

/** Guest RAM as anonymous host memory, and its memory slots. Pages exist once they are touched. */
export class GuestRam implements Disposable {
  readonly memory: GuestMemory;
  /** What backs it, by guest physical address: for I/O without a copy. */
  readonly regions: (readonly [gpa: number, mapping: Mapping])[] = [];

  /** @throws MemoryError when the host refuses. */
  constructor(vm: VmFd, size: number) {
    const protection = PROT_READ | PROT_WRITE;
    const flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    try {
      const regions = ramRanges(size).map((range, slot) => {
        const mapping = mapMemory(range.size, protection, flags, -1, 'mapping guest memory');
        this.regions.push([range.gpa, mapping]);
        mapping.advise(MADV_HUGEPAGE); // a hint: where the host has none, small pages do
        vm.setUserMemoryRegion(slot, range.gpa, mapping.buffer);
        return { gpa: range.gpa, buffer: mapping.buffer };
      });
      this.memory = new GuestMemory(regions);
    } catch (error) {
      this[Symbol.dispose]();
      if (!(error instanceof Error && 'ioctl' in error && error.ioctl === 'mmap')) throw error;
      const message = `memory: the host has no ${size} bytes for this machine; give it less`;
      throw new MemoryError(message, { cause: error });
    }
  }

  [Symbol.dispose](): void {
    for (const [, mapping] of this.regions) mapping.unmap();
    this.regions.length = 0;
  }
}
