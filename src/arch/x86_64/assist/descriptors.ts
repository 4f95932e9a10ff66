import type { GuestCpu } from './cpu.js';
import { Unsupported, undefinedOpcode } from './fault.js';
import { type Instruction, prefix } from './instruction.js';
import type { Definition } from './opcode.js';
import { rflags } from './register-bits.js';

// LAR, LSL, VERR and VERW (SDM 2A, 2B, 2D): questions about a selector, answered in ZF.

const CODE = 8;
const CONFORMING = 4;
/** Readable for code, writable for data. */
const READ_OR_WRITE = 2;

interface Descriptor {
  readonly low: number;
  readonly high: number;
  /** The four type bits. */
  readonly type: number;
  /** Code or data, not a system segment. */
  readonly user: boolean;
}

/** The descriptor a selector names, or undefined for none (a null selector, one beyond its table). */
function lookUp(cpu: GuestCpu, selector: number): Descriptor | undefined {
  if ((selector & ~3) === 0) return undefined;
  const ldt = cpu.sregs.segment('ldt');
  if (selector & 4 && (ldt.unusable || !ldt.present)) return undefined;
  const { base, limit } = selector & 4 ? ldt : cpu.sregs.table('gdt');
  const offset = selector & ~7;
  if (offset + 7 > limit) return undefined;
  const bytes = new Uint8Array(8);
  cpu.readImplicit(base + BigInt(offset), bytes);
  const view = new DataView(bytes.buffer);
  const high = view.getUint32(4, true);
  return { low: view.getUint32(0, true), high, type: (high >> 8) & 15, user: (high & 0x1000) !== 0 };
}

/** Whether the privilege level and the selector's RPL let the descriptor be seen. */
function visible(cpu: GuestCpu, selector: number, { high, type, user }: Descriptor): boolean {
  if (user && (type & (CODE | CONFORMING)) === (CODE | CONFORMING)) return true;
  const dpl = (high >> 13) & 3;
  return cpu.cpl <= dpl && (selector & 3) <= dpl;
}

/** An instruction that yields a value, or undefined for ZF clear. */
function query(answer: (descriptor: Descriptor) => bigint | undefined, write: boolean): Definition['run'] {
  return (cpu: GuestCpu, insn: Instruction) => {
    if (!(cpu.cr0 & 1)) throw undefinedOpcode();
    if (cpu.mode !== 64) throw new Unsupported();
    const selector = Number(cpu.readRm(insn, 2));
    const descriptor = lookUp(cpu, selector);
    const value = descriptor && visible(cpu, selector, descriptor) ? answer(descriptor) : undefined;
    if (value !== undefined && write) cpu.setGpr(insn.reg, insn.operandSize, value);
    cpu.setFlags(rflags.ZF, value === undefined ? 0n : rflags.ZF);
  };
}

/** System descriptors with a limit in long mode: LDT, TSS, busy TSS. LAR knows call gates too. */
const WITH_LIMIT = [2, 9, 11];

function lar({ high, type, user }: Descriptor): bigint | undefined {
  if (!user && type !== 12 && !WITH_LIMIT.includes(type)) return undefined;
  return BigInt(high & 0x00ff_ff00);
}

function lsl({ low, high, type, user }: Descriptor): bigint | undefined {
  if (!user && !WITH_LIMIT.includes(type)) return undefined;
  const limit = (low & 0xffff) | (high & 0xf_0000);
  return BigInt(high & 0x80_0000 ? ((limit << 12) | 0xfff) >>> 0 : limit);
}

function verr({ type, user }: Descriptor): bigint | undefined {
  return user && (!(type & CODE) || type & READ_OR_WRITE) ? 1n : undefined;
}

function verw({ type, user }: Descriptor): bigint | undefined {
  return user && !(type & CODE) && type & READ_OR_WRITE ? 1n : undefined;
}

const prefixes = [prefix.NONE, prefix.P66];

export const descriptorInstructions: readonly Definition[] = [
  { kind: 'lar', map: 1, opcode: 0x02, prefixes, modrm: {}, run: query(lar, true) },
  { kind: 'lsl', map: 1, opcode: 0x03, prefixes, modrm: {}, run: query(lsl, true) },
  { kind: 'verr', map: 1, opcode: 0x00, prefixes, modrm: { reg: 4 }, run: query(verr, false) },
  { kind: 'verw', map: 1, opcode: 0x00, prefixes, modrm: { reg: 5 }, run: query(verw, false) },
];
