import type { GuestCpu } from './cpu.js';
import { generalProtection } from './fault.js';
import { type Instruction, prefix } from './instruction.js';
import type { Definition } from './opcode.js';
import { packed38, packed66, packedImmediate, packedPlain } from './sse-arithmetic.js';
import { type LaneOperation, Lanes, shift } from './vector-lanes.js';

// SSE to SSE4 integer instructions on XMM registers, as kernels use them between kernel_fpu_begin() and _end().

const destination = new Lanes();
const source = new Lanes();

/** Reads a 16-byte memory operand, which the legacy SSE encodings want aligned (SDM 1 11.6.10). */
function readAligned(cpu: GuestCpu, insn: Instruction, into: Uint8Array): void {
  const linear = cpu.linearAddress(insn, into.length, false);
  if (linear & 15n) throw generalProtection();
  cpu.readLinear(linear, into);
}

/** An instruction of the shape xmm, xmm/m128 whose memory operand is aligned. */
function compute(operation: LaneOperation): Definition['run'] {
  return (cpu, insn) => {
    cpu.requireSse();
    if (insn.memory) readAligned(cpu, insn, source.u8);
    const { state } = cpu;
    state.load();
    if (!insn.memory) source.u8.set(state.xmm(insn.rm));
    destination.u8.set(state.xmm(insn.reg));
    operation(destination, source, insn.immediate);
    finish(cpu, insn.reg);
  };
}

/** Stores `destination` into a register. */
function finish(cpu: GuestCpu, register: number): void {
  const { state } = cpu;
  state.xmm(register).set(destination.u8);
  state.touchSse();
  state.store();
}

/** A shift by an XMM or memory operand, whose low 64 bits are the count. */
const shiftBy = (operation: ReturnType<typeof shift>) => compute((d, s) => operation(d, s.u64[0] as bigint));

/** A shift by the immediate of 0F 71, 72 and 73, on the register in ModRM.rm. */
function shiftImmediate(operation: ReturnType<typeof shift>): Definition['run'] {
  return (cpu, insn) => {
    cpu.requireSse();
    cpu.state.load();
    destination.u8.set(cpu.state.xmm(insn.rm));
    operation(destination, BigInt(insn.immediate));
    finish(cpu, insn.rm);
  };
}

/** PSLLDQ and PSRLDQ: by whole bytes. */
const shiftBytes =
  (left: boolean): ReturnType<typeof shift> =>
  (d, count) => {
    const by = Math.min(16, Number(count));
    if (left) d.u8.copyWithin(by, 0, 16 - by).fill(0, 0, by);
    else d.u8.copyWithin(0, by).fill(0, 16 - by);
  };

/** PMOVMSKB: the sign bits of the bytes; MOVMSKPS and MOVMSKPD: of wider lanes. */
function mask(bytes: number): Definition['run'] {
  return (cpu, insn) => {
    cpu.requireSse();
    cpu.state.load();
    const register = cpu.state.xmm(insn.rm);
    let value = 0;
    for (let i = 0; i < 16 / bytes; i++) value |= ((register[i * bytes + bytes - 1] as number) >> 7) << i;
    cpu.setGpr(insn.reg, 8, BigInt(value));
  };
}

/** PINSRB, PINSRW, PINSRD and PINSRQ. */
function insert(bytes: number): Definition['run'] {
  return (cpu, insn) => {
    cpu.requireSse();
    const size = bytes === 4 && insn.rexW ? 8 : bytes;
    const value = cpu.readRm(insn, size);
    const { state } = cpu;
    state.load();
    const at = (insn.immediate % (16 / size)) * size;
    const register = state.xmm(insn.reg);
    for (let i = 0; i < size; i++) register[at + i] = Number((value >> BigInt(8 * i)) & 0xffn);
    state.touchSse();
    state.store();
  };
}

/** PEXTRB, PEXTRW, PEXTRD and PEXTRQ to ModRM.rm; the old PEXTRW puts it in ModRM.reg. */
function extract(bytes: number, toReg = false): Definition['run'] {
  return (cpu, insn) => {
    cpu.requireSse();
    const size = bytes === 4 && insn.rexW ? 8 : bytes;
    cpu.state.load();
    const register = cpu.state.xmm(toReg ? insn.rm : insn.reg);
    const at = (insn.immediate % (16 / size)) * size;
    let value = 0n;
    for (let i = size - 1; i >= 0; i--) value = (value << 8n) | BigInt(register[at + i] as number);
    if (insn.memory) cpu.writeMemoryNumber(insn, size, value);
    else cpu.setGpr(toReg ? insn.reg : insn.rm, 8, value);
  };
}

const { NONE, P66 } = prefix;
const register = { form: 'register' } as const;

const shifts: [name: string, opcode: number, group: number, reg: number, ReturnType<typeof shift>][] = [
  ['psrlw', 0xd1, 0x71, 2, shift(16, 'right')],
  ['psrld', 0xd2, 0x72, 2, shift(32, 'right')],
  ['psrlq', 0xd3, 0x73, 2, shift(64, 'right')],
  ['psraw', 0xe1, 0x71, 4, shift(16, 'arithmetic')],
  ['psrad', 0xe2, 0x72, 4, shift(32, 'arithmetic')],
  ['psllw', 0xf1, 0x71, 6, shift(16, 'left')],
  ['pslld', 0xf2, 0x72, 6, shift(32, 'left')],
  ['psllq', 0xf3, 0x73, 6, shift(64, 'left')],
];

const table = (map: 1 | 2, mandatory: number, operations: typeof packed66): Definition[] =>
  Object.entries(operations).map(([opcode, [kind, operation]]) => {
    return { kind, map, opcode: Number(opcode), prefixes: [mandatory], modrm: {}, run: compute(operation) };
  });

const group = (opcode: number, reg: number) =>
  ({ map: 1, opcode, prefixes: [P66], modrm: { reg, form: 'register' }, immediate: true }) as const;

export const sseInstructions: readonly Definition[] = [
  ...table(1, NONE, packedPlain),
  ...table(1, P66, packed66),
  ...table(2, P66, packed38),
  ...packedImmediate.map(([kind, map, opcode, mandatory, operation]): Definition => {
    return { kind, map, opcode, prefixes: [mandatory], modrm: {}, immediate: true, run: compute(operation) };
  }),
  ...shifts.flatMap(([kind, opcode, groupOpcode, reg, operation]): Definition[] => [
    { kind, map: 1, opcode, prefixes: [P66], modrm: {}, run: shiftBy(operation) },
    { kind, ...group(groupOpcode, reg), run: shiftImmediate(operation) },
  ]),
  { kind: 'psrldq', ...group(0x73, 3), run: shiftImmediate(shiftBytes(false)) },
  { kind: 'pslldq', ...group(0x73, 7), run: shiftImmediate(shiftBytes(true)) },
  { kind: 'pmovmskb', map: 1, opcode: 0xd7, prefixes: [P66], modrm: register, run: mask(1) },
  { kind: 'movmskps', map: 1, opcode: 0x50, prefixes: [NONE], modrm: register, run: mask(4) },
  { kind: 'movmskpd', map: 1, opcode: 0x50, prefixes: [P66], modrm: register, run: mask(8) },
  { kind: 'pinsrw', map: 1, opcode: 0xc4, prefixes: [P66], modrm: {}, immediate: true, run: insert(2) },
  { kind: 'pinsrb', map: 3, opcode: 0x20, prefixes: [P66], modrm: {}, immediate: true, run: insert(1) },
  { kind: 'pinsrd', map: 3, opcode: 0x22, prefixes: [P66], modrm: {}, immediate: true, run: insert(4) },
  { kind: 'pextrw', map: 1, opcode: 0xc5, prefixes: [P66], modrm: register, immediate: true, run: extract(2, true) },
  { kind: 'pextrb', map: 3, opcode: 0x14, prefixes: [P66], modrm: {}, immediate: true, run: extract(1) },
  { kind: 'pextrw', map: 3, opcode: 0x15, prefixes: [P66], modrm: {}, immediate: true, run: extract(2) },
  { kind: 'pextrd', map: 3, opcode: 0x16, prefixes: [P66], modrm: {}, immediate: true, run: extract(4) },
];
