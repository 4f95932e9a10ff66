import type { GuestCpu } from './cpu.js';
import { Unsupported } from './fault.js';
import { type Instruction, prefix } from './instruction.js';
import type { Definition } from './opcode.js';

// KVM interprets these itself. They are what interrupt handlers start with, and completing one steps over a breakpoint on
// it without a trip through KVM.

const DF = 0x400n;

const nothing = () => {};

/** PUSH of a 64-bit value (SDM 2B). */
function push(cpu: GuestCpu, insn: Instruction, value: bigint): void {
  if (cpu.mode !== 64 || insn.operandSize === 2) throw new Unsupported();
  const { regs } = cpu;
  const to = BigInt.asUintN(64, regs.gpr(4) - 8n);
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, BigInt.asUintN(64, value), true);
  cpu.writeLinear(cpu.segmented('ss', to, 8, true), bytes);
  regs.setGpr(4, to);
}

const pushRegister: Definition['run'] = (cpu, insn) => {
  push(cpu, insn, cpu.regs.gpr((insn.opcode & 7) | insn.rexB));
};

const { NONE, P66, PF3 } = prefix;

export const simpleInstructions: readonly Definition[] = [
  { kind: 'nop', map: 0, opcode: 0x90, prefixes: [NONE, P66], run: (_cpu, insn) => plainNop(insn) },
  { kind: 'nop', map: 1, opcode: 0x1f, modrm: { reg: 0 }, run: nothing },
  { kind: 'endbr64', map: 1, opcode: 0x1e, prefixes: [PF3], modrm: { exactly: 0xfa }, run: nothing },
  { kind: 'cld', map: 0, opcode: 0xfc, run: (cpu) => cpu.setFlags(DF, 0n) },
  ...Array.from({ length: 8 }, (_, i): Definition => ({ kind: 'push', map: 0, opcode: 0x50 + i, run: pushRegister })),
  {
    kind: 'push',
    map: 0,
    opcode: 0x6a,
    immediate: true,
    run: (cpu, insn) => push(cpu, insn, BigInt((insn.immediate << 24) >> 24)),
  },
];

/** With REX.B it exchanges RAX and R8. */
function plainNop(insn: Instruction): void {
  if (insn.rexB) throw new Unsupported();
}
