import type { GuestCpu } from './cpu.js';
import { GuestFault, undefinedOpcode, vector } from './fault.js';
import type { Instruction } from './instruction.js';
import type { Definition } from './opcode.js';
import { cr0 } from './register-bits.js';
import { area } from './xstate.js';

// Only the x87 instructions that kernels run around a context switch: SDM 1 chapter 8, and each one's page in SDM 2A.

const STATUS_EXCEPTIONS = 0x80ff; // B, ES, SF and the six flags
const ES = 0x80;
const BUSY = 0x8000;

/** What precedes every x87 instruction: device-not-available, then the pending error unless the form does not wait. */
function begin(cpu: GuestCpu, waits: boolean): void {
  if (cpu.cr0 & (cr0.EM | cr0.TS)) throw new GuestFault(vector.NM);
  cpu.state.load();
  if (waits && cpu.state.statusWord & ES && cpu.cr0 & cr0.NE) throw new GuestFault(vector.MF);
}

/** After a change of control or status word: ES and B say whether an unmasked exception is pending. */
function summarize(cpu: GuestCpu): void {
  const { view } = cpu.state;
  const status = view.getUint16(area.fsw, true);
  const unmasked = status & ~view.getUint16(area.fcw, true) & 0x3f;
  const summary = unmasked ? ES | BUSY : 0;
  view.setUint16(area.fsw, (status & ~(ES | BUSY)) | summary, true);
}

function store(cpu: GuestCpu): void {
  cpu.state.touchX87();
  cpu.state.store();
}

function fnclex(cpu: GuestCpu): void {
  begin(cpu, false);
  const { view } = cpu.state;
  view.setUint16(area.fsw, view.getUint16(area.fsw, true) & ~STATUS_EXCEPTIONS, true);
  store(cpu);
}

function fldcw(cpu: GuestCpu, insn: Instruction): void {
  begin(cpu, true);
  // Bit 6 reads as 1, the other reserved bits as 0.
  const value = Number(cpu.readMemoryNumber(insn, 2));
  cpu.state.view.setUint16(area.fcw, (value & 0x1f3f) | 0x40, true);
  summarize(cpu);
  store(cpu);
}

function fnstswAx(cpu: GuestCpu): void {
  begin(cpu, false);
  cpu.setGpr(0, 2, BigInt(cpu.state.statusWord));
}

/** EMMS: every tag empty, the top of the stack 0 (SDM 3A table 12-2). */
function emms(cpu: GuestCpu): void {
  if (cpu.cr0 & cr0.EM) throw undefinedOpcode();
  begin(cpu, true);
  const { view, bytes } = cpu.state;
  const status = view.getUint16(area.fsw, true);
  bytes[area.ftw] = 0;
  view.setUint16(area.fsw, status & ~0x3800, true);
  // The image lists registers from the top on.
  const registers = bytes.slice(area.st, area.xmm);
  const top = (status >> 11) & 7;
  for (let i = 0; i < 8; i++) bytes.set(registers.subarray(i * 16, i * 16 + 16), area.st + ((i + top) & 7) * 16);
  store(cpu);
}

/** FILD m32int: pushes an integer as an 80-bit number. */
function fild32(cpu: GuestCpu, insn: Instruction): void {
  begin(cpu, true);
  const { state } = cpu;
  const value = Number(BigInt.asIntN(32, cpu.readMemoryNumber(insn, 4)));
  const { view, bytes } = state;
  const status = view.getUint16(area.fsw, true);
  const top = (((status >> 11) & 7) + 7) & 7;
  if ((bytes[area.ftw] as number) & (1 << top)) {
    stackOverflow(cpu, insn, top);
    return;
  }
  bytes.copyWithin(area.st + 16, area.st, area.st + 112);
  bytes.fill(0, area.st, area.st + 16);
  writeInteger(view, value);
  bytes[area.ftw] = (bytes[area.ftw] as number) | (1 << top);
  view.setUint16(area.fsw, (status & ~0x3a00) | (top << 11), true); // C1 is 0
  recordPointers(cpu, insn);
  store(cpu);
}

/** SDM 1 8.5.1.1: masked, a push onto a full stack leaves the indefinite there; unmasked, it changes no register. */
function stackOverflow(cpu: GuestCpu, insn: Instruction, top: number): void {
  const { view, bytes } = cpu.state;
  const masked = (view.getUint16(area.fcw, true) & 1) !== 0;
  let status = view.getUint16(area.fsw, true) | 0x241; // IE, SF, C1
  if (masked) {
    bytes.copyWithin(area.st + 16, area.st, area.st + 112);
    bytes.fill(0, area.st, area.st + 16);
    view.setBigUint64(area.st, 0xc000_0000_0000_0000n, true);
    view.setUint16(area.st + 8, 0xffff, true);
    status = (status & ~0x3800) | (top << 11);
  }
  view.setUint16(area.fsw, status, true);
  summarize(cpu);
  recordPointers(cpu, insn);
  store(cpu);
}

/** ST(0) as an 80-bit number (SDM 1 4.2.2). */
function writeInteger(view: DataView, value: number): void {
  if (value === 0) return;
  const magnitude = Math.abs(value);
  const exponent = 31 - Math.clz32(magnitude);
  view.setBigUint64(area.st, BigInt(magnitude) << BigInt(63 - exponent), true);
  view.setUint16(area.st + 8, (16383 + exponent) | (value < 0 ? 0x8000 : 0), true);
}

/** Instruction and operand pointers, and the opcode (SDM 1 8.1.8). */
function recordPointers(cpu: GuestCpu, insn: Instruction): void {
  const { view } = cpu.state;
  view.setBigUint64(area.fip, cpu.regs.rip, true);
  view.setBigUint64(area.fdp, cpu.linearAddress(insn, 4, false), true);
  view.setUint16(area.fop, ((insn.opcode & 7) << 8) | insn.modrm, true);
}

export const x87Instructions: readonly Definition[] = [
  { kind: 'fldcw', map: 0, opcode: 0xd9, modrm: { reg: 5, form: 'memory' }, run: fldcw },
  { kind: 'fild', map: 0, opcode: 0xdb, modrm: { reg: 0, form: 'memory' }, run: fild32 },
  { kind: 'fnclex', map: 0, opcode: 0xdb, modrm: { exactly: 0xe2 }, run: fnclex },
  { kind: 'fnstsw', map: 0, opcode: 0xdf, modrm: { exactly: 0xe0 }, run: fnstswAx },
  { kind: 'emms', map: 1, opcode: 0x77, prefixes: [0], run: emms },
];
