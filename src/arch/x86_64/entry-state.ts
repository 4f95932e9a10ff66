import type { Segment } from '../../kvm/registers.js';
import { Regs } from '../../kvm/registers.js';
import type { VcpuFd } from '../../kvm/vcpu.js';
import { layout } from '../../machine/layout.js';

/** CR0: PE, ET, and for long mode NE, WP, PG (SDM 3A 2.5). */
const CR0_PROTECTED = 0x11n;
const CR0_LONG = 0x80010031n;
/** CR4.PAE. */
const CR4_PAE = 0x20n;
/** EFER: LME and LMA. */
const EFER_LONG = 0x500n;

const RSI = 6;
const RBX = 3;

const flat: Segment = {
  base: 0n,
  limit: 0xffffffff,
  selector: 0,
  type: 3,
  present: 1,
  dpl: 0,
  db: 1,
  s: 1,
  l: 0,
  g: 1,
  avl: 0,
  unusable: 0,
};

/** Busy 32-bit TSS at 0: VMX refuses to enter a guest without one. */
const taskState: Segment = { ...flat, limit: 0x67, type: 11, s: 0, db: 0, g: 0 };

/** Where and how the boot processor starts. */
export interface EntryState {
  readonly protocol: 'linux64' | 'pvh';
  readonly rip: number;
  /** Guest physical address of the boot_params (Linux) or hvm_start_info (PVH). */
  readonly paramsGpa: number;
}

/**
 * Sets the boot processor's registers.
 * linux64: boot.rst "64-bit boot protocol": long mode, identity-mapped tables, __BOOT_CS 0x10 and __BOOT_DS 0x18, RSI =
 * boot_params, interrupts off. pvh: Xen's pvh.rst: 32-bit protected mode without paging, EBX = hvm_start_info.
 */
export function setEntryState(vcpu: VcpuFd, entry: EntryState): void {
  const long = entry.protocol === 'linux64';
  const sregs = vcpu.getSregs();
  sregs.setSegment('cs', { ...flat, selector: 0x10, type: 11, db: long ? 0 : 1, l: long ? 1 : 0 });
  for (const name of ['ds', 'es', 'fs', 'gs', 'ss'] as const) sregs.setSegment(name, { ...flat, selector: 0x18 });
  sregs.setSegment('tr', taskState);
  sregs.setTable('gdt', BigInt(layout.bootGdt), 4 * 8 - 1);
  sregs.setTable('idt', BigInt(layout.bootIdt), 0); // empty: a fault before the kernel has one is a triple fault
  sregs.cr0 = long ? CR0_LONG : CR0_PROTECTED;
  sregs.cr3 = long ? BigInt(layout.bootPageTables) : 0n;
  sregs.cr4 = long ? CR4_PAE : 0n;
  sregs.efer = long ? EFER_LONG : 0n;
  vcpu.setSregs(sregs);

  const regs = new Regs();
  regs.rip = BigInt(entry.rip);
  regs.rflags = 2n;
  regs.setGpr(long ? RSI : RBX, BigInt(entry.paramsGpa));
  vcpu.setRegs(regs);
}
