import { kvm_dtable, kvm_regs, kvm_segment, kvm_sregs } from './generated/abi.js';

/** General registers by their number in an instruction: 0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP, 5 RBP, 6 RSI, 7 RDI, 8 to 15. */
const GPR_WORDS = (['rax', 'rcx', 'rdx', 'rbx', 'rsp', 'rbp', 'rsi', 'rdi'] as const)
  .map((name) => kvm_regs[name] / 8)
  .concat((['r8', 'r9', 'r10', 'r11', 'r12', 'r13', 'r14', 'r15'] as const).map((name) => kvm_regs[name] / 8));

const RIP = kvm_regs.rip / 8;
const RFLAGS = kvm_regs.rflags / 8;

/** A struct kvm_regs, in a buffer of its own or in a vCPU's kvm_run. */
export class Regs {
  readonly words: BigUint64Array;

  constructor(words: BigUint64Array = new BigUint64Array(kvm_regs.sizeof / 8)) {
    this.words = words;
  }

  /** @param number 0 to 15, as instructions encode it. */
  gpr(number: number): bigint {
    return this.words[GPR_WORDS[number] as number] as bigint;
  }

  setGpr(number: number, value: bigint): void {
    this.words[GPR_WORDS[number] as number] = value;
  }

  get rip(): bigint {
    return this.words[RIP] as bigint;
  }

  set rip(value: bigint) {
    this.words[RIP] = value;
  }

  get rflags(): bigint {
    return this.words[RFLAGS] as bigint;
  }

  set rflags(value: bigint) {
    this.words[RFLAGS] = value;
  }
}

/** 256 vectors. */
const INTERRUPT_BITMAP_BYTES = 32;

export type SegmentName = 'cs' | 'ds' | 'es' | 'fs' | 'gs' | 'ss' | 'tr' | 'ldt';

/** A segment register with its hidden part (struct kvm_segment; SDM 3A 3.4.3). */
export interface Segment {
  base: bigint;
  limit: number;
  selector: number;
  type: number;
  present: number;
  dpl: number;
  db: number;
  s: number;
  l: number;
  g: number;
  avl: number;
  unusable: number;
}

/** A struct kvm_sregs, in a buffer of its own or in a vCPU's kvm_run. */
export class Sregs {
  readonly view: DataView;

  constructor(view: DataView = new DataView(new ArrayBuffer(kvm_sregs.sizeof))) {
    this.view = view;
  }

  get cr0(): bigint {
    return this.view.getBigUint64(kvm_sregs.cr0, true);
  }
  set cr0(value: bigint) {
    this.view.setBigUint64(kvm_sregs.cr0, value, true);
  }
  get cr2(): bigint {
    return this.view.getBigUint64(kvm_sregs.cr2, true);
  }
  set cr2(value: bigint) {
    this.view.setBigUint64(kvm_sregs.cr2, value, true);
  }
  get cr3(): bigint {
    return this.view.getBigUint64(kvm_sregs.cr3, true);
  }
  set cr3(value: bigint) {
    this.view.setBigUint64(kvm_sregs.cr3, value, true);
  }
  get cr4(): bigint {
    return this.view.getBigUint64(kvm_sregs.cr4, true);
  }
  set cr4(value: bigint) {
    this.view.setBigUint64(kvm_sregs.cr4, value, true);
  }
  get efer(): bigint {
    return this.view.getBigUint64(kvm_sregs.efer, true);
  }
  set efer(value: bigint) {
    this.view.setBigUint64(kvm_sregs.efer, value, true);
  }

  /** Current privilege level: the RPL of SS holds it where CS may be conforming (SDM 3A 5.5). */
  get cpl(): number {
    return this.view.getUint16(kvm_sregs.cs + kvm_segment.selector, true) & 3;
  }

  segment(name: SegmentName): Segment {
    const at = kvm_sregs[name];
    const u8 = (offset: number) => this.view.getUint8(at + offset);
    return {
      base: this.view.getBigUint64(at + kvm_segment.base, true),
      limit: this.view.getUint32(at + kvm_segment.limit, true),
      selector: this.view.getUint16(at + kvm_segment.selector, true),
      type: u8(kvm_segment.type),
      present: u8(kvm_segment.present),
      dpl: u8(kvm_segment.dpl),
      db: u8(kvm_segment.db),
      s: u8(kvm_segment.s),
      l: u8(kvm_segment.l),
      g: u8(kvm_segment.g),
      avl: u8(kvm_segment.avl),
      unusable: u8(kvm_segment.unusable),
    };
  }

  setSegment(name: SegmentName, segment: Segment): void {
    const at = kvm_sregs[name];
    this.view.setBigUint64(at + kvm_segment.base, segment.base, true);
    this.view.setUint32(at + kvm_segment.limit, segment.limit, true);
    this.view.setUint16(at + kvm_segment.selector, segment.selector, true);
    for (const field of ['type', 'present', 'dpl', 'db', 's', 'l', 'g', 'avl', 'unusable'] as const) {
      this.view.setUint8(at + kvm_segment[field], segment[field]);
    }
  }

  /** Forgets which interrupt was being delivered, so that setting these registers does not queue it a second time. */
  clearInterruptBitmap(): void {
    for (let i = 0; i < INTERRUPT_BITMAP_BYTES; i += 4) this.view.setUint32(kvm_sregs.interrupt_bitmap + i, 0, true);
  }

  segmentBase(name: SegmentName): bigint {
    return this.view.getBigUint64(kvm_sregs[name] + kvm_segment.base, true);
  }

  table(name: 'gdt' | 'idt'): { base: bigint; limit: number } {
    const at = kvm_sregs[name];
    return {
      base: this.view.getBigUint64(at + kvm_dtable.base, true),
      limit: this.view.getUint16(at + kvm_dtable.limit, true),
    };
  }

  setTable(name: 'gdt' | 'idt', base: bigint, limit: number): void {
    const at = kvm_sregs[name];
    this.view.setBigUint64(at + kvm_dtable.base, base, true);
    this.view.setUint16(at + kvm_dtable.limit, limit, true);
  }
}
