import type { GuestCpu } from './cpu.js';
import { undefinedOpcode } from './fault.js';
import { type Instruction, prefix } from './instruction.js';
import type { Definition } from './opcode.js';
import { ARITHMETIC, rflags } from './register-bits.js';

/** The bits of a value of `size` bytes. */
const bitsOf = (size: number) => BigInt(size * 8);

export function popcount(value: bigint): number {
  let count = 0;
  for (let v = value; v; v &= v - 1n) count++;
  return count;
}

/** POPCNT (SDM 2B): clears every arithmetic flag but ZF. */
function popcnt(cpu: GuestCpu, insn: Instruction): void {
  const value = cpu.readRm(insn, insn.operandSize);
  cpu.setGpr(insn.reg, insn.operandSize, BigInt(popcount(value)));
  cpu.setFlags(ARITHMETIC, value === 0n ? rflags.ZF : 0n);
}

/** TZCNT and LZCNT (SDM 2B, 2A). KVM's emulator runs them as BSF and BSR, so they come here only where it has neither. */
function countZeros(trailing: boolean): (cpu: GuestCpu, insn: Instruction) => void {
  return (cpu, insn) => {
    const size = insn.operandSize;
    const value = cpu.readRm(insn, size);
    let count = size * 8;
    if (value) count = trailing ? (value & -value).toString(2).length - 1 : count - value.toString(2).length;
    cpu.setGpr(insn.reg, size, BigInt(count));
    cpu.setFlags(rflags.CF | rflags.ZF, (value === 0n ? rflags.CF : 0n) | (count === 0 ? rflags.ZF : 0n));
  };
}

/** What a BMI instruction yields: the destination, and CF where it is set. */
type Bmi = (size: number, source: bigint, extra: bigint) => { value: bigint; carry?: boolean };

/** BMI1 and BMI2 instructions that set flags (SDM 2A to 2D): OF is 0, ZF and SF follow the result. */
function bmi(destination: 'reg' | 'vvvv', operation: Bmi): (cpu: GuestCpu, insn: Instruction) => void {
  return (cpu, insn) => {
    if (insn.vexL) throw undefinedOpcode();
    const size = insn.operandSize;
    const { value, carry = false } = operation(size, cpu.readRm(insn, size), cpu.gpr(insn.vvvv, size));
    const result = BigInt.asUintN(size * 8, value);
    cpu.setGpr(insn[destination], size, result);
    let flags = carry ? rflags.CF : 0n;
    if (result === 0n) flags |= rflags.ZF;
    if (result >> (bitsOf(size) - 1n)) flags |= rflags.SF;
    cpu.setFlags(rflags.CF | rflags.ZF | rflags.SF | rflags.OF, flags);
  };
}

const bextr: Bmi = (_size, source, control) => {
  const length = (control >> 8n) & 0xffn;
  return { value: (source >> (control & 0xffn)) & ((1n << length) - 1n) };
};

const bzhi: Bmi = (size, source, index) => {
  const from = index & 0xffn;
  const past = from >= bitsOf(size);
  return { value: past ? source : source & ((1n << from) - 1n), carry: past };
};

/** BMI2 instructions that leave the flags alone. */
function quiet(operation: (size: number, source: bigint, extra: bigint) => bigint): Definition['run'] {
  return (cpu, insn) => {
    if (insn.vexL) throw undefinedOpcode();
    const size = insn.operandSize;
    cpu.setGpr(insn.reg, size, operation(size, cpu.readRm(insn, size), cpu.gpr(insn.vvvv, size)));
  };
}

const shiftCount = (size: number, count: bigint) => count & (bitsOf(size) - 1n);

function deposit(_size: number, mask: bigint, source: bigint): bigint {
  let value = 0n;
  let from = source;
  for (let left = mask; left; left &= left - 1n, from >>= 1n) if (from & 1n) value |= left & -left;
  return value;
}

function extract(_size: number, mask: bigint, source: bigint): bigint {
  let value = 0n;
  let to = 1n;
  for (let left = mask; left; left &= left - 1n, to <<= 1n) if (source & left & -left) value |= to;
  return value;
}

/** MULX (SDM 2B): RDX times the operand; when both destinations are one register it gets the high half. */
function mulx(cpu: GuestCpu, insn: Instruction): void {
  if (insn.vexL) throw undefinedOpcode();
  const size = insn.operandSize;
  const product = cpu.gpr(2, size) * cpu.readRm(insn, size);
  cpu.setGpr(insn.vvvv, size, product);
  cpu.setGpr(insn.reg, size, product >> bitsOf(size));
}

/** RORX (SDM 2B). */
function rorx(cpu: GuestCpu, insn: Instruction): void {
  if (insn.vexL || insn.vvvv) throw undefinedOpcode();
  const size = insn.operandSize;
  const count = shiftCount(size, BigInt(insn.immediate));
  const value = cpu.readRm(insn, size);
  cpu.setGpr(insn.reg, size, (value >> count) | (value << (bitsOf(size) - count)));
}

/** ADCX and ADOX (SDM 2A): an addition whose only flag, in and out, is CF or OF. The 66 prefix is not an operand size. */
function addWith(flag: bigint): (cpu: GuestCpu, insn: Instruction) => void {
  return (cpu, insn) => {
    const size = insn.rexW ? 8 : 4;
    const carry = cpu.regs.rflags & flag ? 1n : 0n;
    const sum = cpu.readRm(insn, size) + cpu.gpr(insn.reg, size) + carry;
    cpu.setGpr(insn.reg, size, sum);
    cpu.setFlags(flag, sum >> bitsOf(size) ? flag : 0n);
  };
}

/** MOVBE (SDM 2B). */
function movbe(store: boolean): (cpu: GuestCpu, insn: Instruction) => void {
  return (cpu, insn) => {
    const size = insn.operandSize;
    const value = store ? cpu.gpr(insn.reg, size) : cpu.readMemoryNumber(insn, size);
    let swapped = 0n;
    for (let i = 0n; i < size; i++) swapped = (swapped << 8n) | ((value >> (8n * i)) & 0xffn);
    if (store) cpu.writeMemoryNumber(insn, size, swapped);
    else cpu.setGpr(insn.reg, size, swapped);
  };
}

/** The polynomial of CRC32 (SDM 2A), bits reflected. */
const CRC32C = 0x82f63b78;

/** CRC32 (SDM 2A). The destination is 64 bits wide with REX.W, and its upper half always ends as zero. */
function crc32(byte: boolean): (cpu: GuestCpu, insn: Instruction) => void {
  return (cpu, insn) => {
    const size = byte ? 1 : insn.operandSize;
    let data: bigint;
    if (byte && !insn.memory && !insn.rex && insn.rm >= 4) data = (cpu.gpr(insn.rm - 4, 2) >> 8n) & 0xffn;
    else data = cpu.readRm(insn, size);
    let crc = Number(cpu.gpr(insn.reg, 4));
    for (let i = 0; i < size; i++, data >>= 8n) {
      crc ^= Number(data & 0xffn);
      for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ CRC32C : crc >>> 1;
    }
    cpu.setGpr(insn.reg, 8, BigInt(crc >>> 0));
  };
}

const { NONE, P66, PF2, PF3 } = prefix;
const vex = (opcode: number, mandatory: number, reg?: number) =>
  ({ vex: true, map: 2, opcode, prefixes: [mandatory], modrm: reg === undefined ? {} : { reg } }) as const;
const plain = (map: 1 | 2, opcode: number, prefixes: readonly number[]) =>
  ({ map, opcode, prefixes, modrm: {} }) as const;
const memory = { form: 'memory' } as const;

export const bitInstructions: readonly Definition[] = [
  { kind: 'popcnt', ...plain(1, 0xb8, [PF3]), run: popcnt },
  { kind: 'tzcnt', ...plain(1, 0xbc, [PF3]), run: countZeros(true) },
  { kind: 'lzcnt', ...plain(1, 0xbd, [PF3]), run: countZeros(false) },
  { kind: 'andn', ...vex(0xf2, NONE), run: bmi('reg', (_size, a, b) => ({ value: ~b & a })) },
  { kind: 'bextr', ...vex(0xf7, NONE), run: bmi('reg', bextr) },
  { kind: 'blsr', ...vex(0xf3, NONE, 1), run: bmi('vvvv', (_, v) => ({ value: (v - 1n) & v, carry: v === 0n })) },
  { kind: 'blsmsk', ...vex(0xf3, NONE, 2), run: bmi('vvvv', (_, v) => ({ value: (v - 1n) ^ v, carry: v === 0n })) },
  { kind: 'blsi', ...vex(0xf3, NONE, 3), run: bmi('vvvv', (_, v) => ({ value: -v & v, carry: v !== 0n })) },
  { kind: 'bzhi', ...vex(0xf5, NONE), run: bmi('reg', bzhi) },
  { kind: 'pdep', ...vex(0xf5, PF2), run: quiet(deposit) },
  { kind: 'pext', ...vex(0xf5, PF3), run: quiet(extract) },
  { kind: 'mulx', ...vex(0xf6, PF2), run: mulx },
  { kind: 'shlx', ...vex(0xf7, P66), run: quiet((size, v, n) => v << shiftCount(size, n)) },
  { kind: 'shrx', ...vex(0xf7, PF2), run: quiet((size, v, n) => v >> shiftCount(size, n)) },
  { kind: 'sarx', ...vex(0xf7, PF3), run: quiet((size, v, n) => BigInt.asIntN(size * 8, v) >> shiftCount(size, n)) },
  { kind: 'rorx', vex: true, map: 3, opcode: 0xf0, prefixes: [PF2], modrm: {}, immediate: true, run: rorx },
  { kind: 'adcx', ...plain(2, 0xf6, [P66]), run: addWith(rflags.CF) },
  { kind: 'adox', ...plain(2, 0xf6, [PF3]), run: addWith(rflags.OF) },
  { kind: 'crc32', ...plain(2, 0xf0, [PF2]), run: crc32(true) },
  { kind: 'crc32', ...plain(2, 0xf1, [PF2]), run: crc32(false) },
  { kind: 'movbe', ...plain(2, 0xf0, [NONE, P66]), modrm: memory, run: movbe(false) },
  { kind: 'movbe', ...plain(2, 0xf1, [NONE, P66]), modrm: memory, run: movbe(true) },
];
