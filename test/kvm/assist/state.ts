import type { Executor } from './executor.js';
import type { Random } from './random.js';

const AVX = 4n;
/** Rights of user mode, two bits for each protection key (SDM 1 13.5.7). */
const PKRU = 9;

/** A random x87, SSE and extended state: valid, with every component of XCR0 in use or not. */
export function randomState(executor: Executor, random: Random): Uint8Array {
  const area = executor.guest.xsave();
  const view = new DataView(area.buffer);
  const mask = view.getUint32(28, true);
  const cpuid = executor.guest.kvm.supportedCpuid();
  area.fill(0, 0, 512);
  view.setUint16(0, 0x37f & ~(random.chance(20) ? 1 << random.below(6) : 0), true);
  const status = random.chance(30) ? random.below(0x80) & 0x7f : 0;
  view.setUint16(2, (random.below(8) << 11) | status, true);
  summarize(view);
  area[4] = random.below(256);
  // The x87 pointers stay 0: CPUs may drop them unless an exception is pending (SDM 1 8.1.8, AMD APM 2 11.4.4).
  for (let st = 0; st < 8; st++) random.fill(area.subarray(32 + st * 16, 42 + st * 16));
  view.setUint32(24, random.chance(50) ? 0x1f80 : random.u32() & 0xffbf, true);
  view.setUint32(28, mask, true);
  random.fill(area.subarray(160, 416));
  let used = 3n;
  for (let component = 2; component < 63; component++) {
    const bit = 1n << BigInt(component);
    const leaf = cpuid.get(0xd, component);
    if (!(executor.xcr0 & bit) || !leaf) continue;
    random.fill(area.subarray(leaf.ebx, leaf.ebx + leaf.eax));
    if (component === PKRU) {
      // Every page has key 0. Where KVM interprets the kernel, user mode runs with the host's CR4.PKE, so that PKRU counts.
      area[leaf.ebx] = (area[leaf.ebx] as number) & ~3;
      // Always in use: else KVM leaves the last one, and CPUs go on counting it in (SDM 1 13.6: XINUSE may stay 1).
      used |= bit;
      continue;
    }
    // CPUs count AVX as in use when AVX-512 is.
    if (random.chance(80) && (component === 2 || used & AVX)) used |= bit;
    else area.fill(0, leaf.ebx, leaf.ebx + leaf.eax);
  }
  view.setBigUint64(512, used, true);
  return area;
}

/** The error summary and busy bits that follow from the exceptions flagged and unmasked. */
function summarize(view: DataView): void {
  const status = view.getUint16(2, true);
  if (status & ~view.getUint16(0, true) & 0x3f) view.setUint16(2, status | 0x8080, true);
}
