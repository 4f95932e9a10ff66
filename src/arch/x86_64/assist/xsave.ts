import { KvmError } from '../../../errors.js';
import type { GuestCpu } from './cpu.js';
import { generalProtection, Unsupported, undefinedOpcode } from './fault.js';
import type { Component } from './guest-cpuid.js';
import { type Instruction, prefix } from './instruction.js';
import type { Definition } from './opcode.js';
import { access } from './page-walk.js';
import { cr4 } from './register-bits.js';
import { AVX, area, MXCSR_RESET, SSE, X87 } from './xstate.js';

/** XCOMP_BV bit 63: the area is in the compacted format (SDM 1 13.4.2). */
const COMPACTED = 1n << 63n;
const IA32_XSS = 0xda0;

const XSAVEC_FEATURE = 2;

/** The four ways to save (SDM 1 13.7, 13.9, 13.10, 13.11). */
interface SaveKind {
  /** Leave out components in their initial configuration. */
  readonly optimized: boolean;
  readonly compacted: boolean;
  readonly supervisor: boolean;
}

/** The components that EDX:EAX asks for and the system allows: RFBM (SDM 1 13.4). */
function requested(cpu: GuestCpu, supervisor: boolean): { rfbm: bigint; xcr0: bigint } {
  const { state, regs } = cpu;
  const { xcr0 } = state;
  const mask = ((regs.gpr(2) & 0xffff_ffffn) << 32n) | (regs.gpr(0) & 0xffff_ffffn);
  // KVM gives userspace no supervisor components, so a guest that enables one cannot be helped.
  if (supervisor && state.cpuid.supervisorComponents & mask) {
    if ((cpu.vcpu.getMsr(IA32_XSS) ?? 0n) & mask) throw new Unsupported('supervisor state');
  }
  return { rfbm: xcr0 & mask, xcr0 };
}

function place(cpu: GuestCpu, insn: Instruction, length: number, write: boolean): bigint {
  const linear = cpu.linearAddress(insn, length, write);
  if (linear & 63n) throw generalProtection();
  return linear;
}

/** Offsets of the components in the compacted format, which are those of XCOMP_BV in order (SDM 1 13.4.3). */
function* compactedPlaces(components: readonly Component[], xcompBv: bigint): Iterable<[Component, number]> {
  let offset: number = area.extended;
  for (const component of components) {
    if (!(xcompBv & (1n << BigInt(component.number)))) continue;
    if (component.aligned) offset = (offset + 63) & ~63;
    yield [component, offset];
    offset += component.size;
  }
}

function* standardPlaces(components: readonly Component[]): Iterable<[Component, number]> {
  for (const component of components) yield [component, component.offset];
}

/** Without REX.W the x87 pointers are 32 bits wide, with selectors that are 0 in 64-bit code (SDM 1 13.5.1). */
function narrowPointers(insn: Instruction, x87: Uint8Array): void {
  if (insn.rexW) return;
  x87.fill(0, area.fip + 4, area.fdp);
  x87.fill(0, area.fdp + 4, area.mxcsr);
}

/** ST registers are 10 bytes each; what stands in the 6 after them is not kept. */
function clearPadding(bytes: Uint8Array): void {
  for (let at: number = area.st; at < area.xmm; at += 16) bytes.fill(0, at + 10, at + 16);
}

/** How many bytes of XMM registers the mode has (SDM 1 13.5.2). */
const xmmEnd = (cpu: GuestCpu) => (cpu.mode === 64 ? area.xmmEnd : area.xmm + 128);

function save(kind: SaveKind): (cpu: GuestCpu, insn: Instruction) => void {
  return (cpu, insn) => {
    cpu.requireXsave();
    if (kind.supervisor) cpu.requireCpl0();
    const base = place(cpu, insn, area.extended, true);
    const { rfbm } = requested(cpu, kind.supervisor);
    const { state } = cpu;
    state.load();
    let used = state.xstateBv & rfbm;
    // In the compacted format MXCSR is part of SSE; where it is not its reset value SSE is saved (SDM 1 13.10).
    if (kind.compacted && state.mxcsr !== MXCSR_RESET) used |= rfbm & SSE;
    const saved = kind.optimized ? used : rfbm;

    const parts: [offset: number, bytes: Uint8Array][] = [];
    const { bytes } = state;
    const add = (from: number, to: number, at = from) => parts.push([at, bytes.subarray(from, to)]);
    if (saved & X87) {
      narrowPointers(insn, bytes);
      add(0, area.mxcsr);
      add(area.st, area.xmm);
    }
    if (kind.compacted ? saved & SSE : rfbm & (SSE | AVX)) add(area.mxcsr, area.st);
    if (saved & SSE) add(area.xmm, xmmEnd(cpu));
    const { components } = state.cpuid;
    let end: number = area.extended;
    for (const [component, offset] of kind.compacted ? compactedPlaces(components, rfbm) : standardPlaces(components)) {
      const bit = 1n << BigInt(component.number);
      if (rfbm & bit) end = Math.max(end, offset + component.size);
      if (saved & bit) add(component.offset, component.offset + component.saved, offset);
    }

    const header = new DataView(new ArrayBuffer(kind.compacted ? 16 : 8));
    parts.push([area.header, new Uint8Array(header.buffer)]);
    // The whole area must be writable, even where a component that is asked for is then left out.
    cpu.open(base, end, access.WRITE);
    let xstateBv = used;
    if (kind.compacted) header.setBigUint64(8, rfbm | COMPACTED, true);
    else {
      const old = new Uint8Array(8);
      cpu.memory.get(area.header, old);
      xstateBv |= new DataView(old.buffer).getBigUint64(0, true) & ~rfbm;
    }
    header.setBigUint64(0, xstateBv, true);
    for (const [offset, part] of parts) cpu.memory.put(offset, part);
  };
}

/** The header of an area to restore from (SDM 1 13.4.2, and the #GP conditions of 13.8 and 13.12). */
function readHeader(cpu: GuestCpu, base: bigint, xcr0: bigint, supervisor: boolean) {
  const start = new Uint8Array(area.extended);
  cpu.readLinear(base, start);
  const header = new DataView(start.buffer, area.header);
  const xstateBv = header.getBigUint64(0, true);
  const xcompBv = header.getBigUint64(8, true);
  const compacted = (xcompBv & COMPACTED) !== 0n;
  const reservedFrom = (from: number) => {
    for (let at = from; at < 64; at += 8) if (header.getBigUint64(at, true)) throw generalProtection();
  };
  if (supervisor && !compacted) throw generalProtection();
  if (compacted) {
    if (!(cpu.state.cpuid.xsaveFeatures & XSAVEC_FEATURE)) throw generalProtection();
    const formats = xcompBv & ~COMPACTED;
    if (formats & ~xcr0 || xstateBv & ~formats) throw generalProtection();
    reservedFrom(16);
  } else {
    if (xstateBv & ~xcr0 || xcompBv) throw generalProtection();
    // Intel's standard form ignores bytes 63 to 24; AMD CPUs want zero there too.
    if (header.getBigUint64(16, true)) throw generalProtection();
  }
  return { xstateBv, xcompBv, compacted };
}

function restore(supervisor: boolean): (cpu: GuestCpu, insn: Instruction) => void {
  return (cpu, insn) => {
    cpu.requireXsave();
    if (supervisor) cpu.requireCpl0();
    const base = place(cpu, insn, area.extended, false);
    const { rfbm, xcr0 } = requested(cpu, supervisor);
    const { xstateBv, xcompBv, compacted } = readHeader(cpu, base, xcr0, supervisor);
    const { state } = cpu;
    const { components } = state.cpuid;
    const loaded = rfbm & xstateBv;
    const extended: [component: Component, offset: number][] = [];
    let end: number = area.extended;
    for (const [component, at] of compacted ? compactedPlaces(components, xcompBv) : standardPlaces(components)) {
      const bit = 1n << BigInt(component.number);
      if ((compacted ? loaded : rfbm) & bit) end = Math.max(end, at + component.size);
      if (loaded & bit) extended.push([component, at]);
    }
    // In the standard format CPUs want all of it there, even where a component that is asked for is then initialized.
    const image = new Uint8Array(end);
    cpu.readLinear(base, image);
    state.load();
    // The standard form loads MXCSR for SSE or AVX whatever XSTATE_BV says; the compacted one as part of SSE.
    const takesMxcsr = compacted ? rfbm & SSE : rfbm & (SSE | AVX);
    const fromMemory = compacted ? loaded & SSE : takesMxcsr;
    const mxcsr = fromMemory ? new DataView(image.buffer).getUint32(area.mxcsr, true) : MXCSR_RESET;
    if (mxcsr & ~state.mxcsrMask) throw generalProtection();

    for (let bit = 1n; bit <= rfbm; bit <<= 1n) if (rfbm & bit & ~xstateBv) state.initialize(bit);
    const { bytes } = state;
    if (loaded & X87) {
      narrowPointers(insn, image);
      bytes.set(image.subarray(0, area.mxcsr));
      bytes.set(image.subarray(area.st, area.xmm), area.st);
      clearPadding(bytes);
    }
    if (loaded & SSE) bytes.set(image.subarray(area.xmm, xmmEnd(cpu)), area.xmm);
    for (const [component, at] of extended) bytes.set(image.subarray(at, at + component.size), component.offset);
    if (takesMxcsr) state.mxcsr = mxcsr;
    state.xstateBv |= loaded;
    state.store();
  };
}

/** XGETBV (SDM 2D): ECX 0 is XCR0; ECX 1 the components of it in use. */
function xgetbv(cpu: GuestCpu): void {
  if (!(cpu.cr4 & cr4.OSXSAVE)) throw undefinedOpcode();
  const { state, regs } = cpu;
  const number = Number(regs.gpr(1) & 0xffff_ffffn);
  let value = state.xcr0;
  if (number === 1 && state.cpuid.xsaveFeatures & 4) {
    state.load();
    value &= state.xstateBv;
  } else if (number !== 0) throw generalProtection();
  cpu.setGpr(0, 4, value);
  cpu.setGpr(2, 4, value >> 32n);
}

/** XSETBV (SDM 2D). KVM itself judges the value: what it refuses is a #GP. */
function xsetbv(cpu: GuestCpu): void {
  if (!(cpu.cr4 & cr4.OSXSAVE)) throw undefinedOpcode();
  cpu.requireCpl0();
  const { regs, vcpu } = cpu;
  const value = ((regs.gpr(2) & 0xffff_ffffn) << 32n) | (regs.gpr(0) & 0xffff_ffffn);
  if (regs.gpr(1) & 0xffff_ffffn || !(value & X87) || (value & AVX && !(value & SSE))) throw generalProtection();
  try {
    vcpu.setXcr0(value);
  } catch (error) {
    if (error instanceof KvmError) throw generalProtection();
    throw error;
  }
}

const at = (opcode: number, reg: number, prefixes = [prefix.NONE]) => {
  return { map: 1, opcode, prefixes, modrm: { reg, form: 'memory' } } as const;
};
const system = (exactly: number) => {
  return { map: 1, opcode: 0x01, prefixes: [prefix.NONE], modrm: { exactly } } as const;
};

export const xsaveFamily: readonly Definition[] = [
  { kind: 'xsave', ...at(0xae, 4), run: save({ optimized: false, compacted: false, supervisor: false }) },
  { kind: 'xrstor', ...at(0xae, 5), run: restore(false) },
  { kind: 'xsaveopt', ...at(0xae, 6), run: save({ optimized: true, compacted: false, supervisor: false }) },
  { kind: 'xrstors', ...at(0xc7, 3), run: restore(true) },
  { kind: 'xsavec', ...at(0xc7, 4), run: save({ optimized: true, compacted: true, supervisor: false }) },
  { kind: 'xsaves', ...at(0xc7, 5), run: save({ optimized: true, compacted: true, supervisor: true }) },
  { kind: 'xgetbv', ...system(0xd0), run: xgetbv },
  { kind: 'xsetbv', ...system(0xd1), run: xsetbv },
];
