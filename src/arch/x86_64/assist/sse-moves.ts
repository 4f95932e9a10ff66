import type { GuestCpu } from './cpu.js';
import { generalProtection } from './fault.js';
import { type Instruction, prefix } from './instruction.js';
import type { Definition } from './opcode.js';

// Moves to and from XMM registers (SDM 2A and 2B, each one's page).

/** How a load places what it reads: `bytes` at `at`, with the rest of the register kept or cleared. */
interface Part {
  readonly bytes: number;
  readonly at?: number;
  /** Where a register source is read from. */
  readonly from?: number;
  /** Clear the rest on a load from memory, and on a move between registers. */
  readonly zeroMemory?: boolean;
  readonly zeroRegister?: boolean;
  readonly aligned?: boolean;
}

function address(cpu: GuestCpu, insn: Instruction, part: Part, write: boolean): bigint {
  const linear = cpu.linearAddress(insn, part.bytes, write);
  if (part.aligned && linear & 15n) throw generalProtection();
  return linear;
}

function load(part: Part): Definition['run'] {
  const { bytes, at = 0, from = 0, zeroMemory = false, zeroRegister = false } = part;
  return (cpu, insn) => {
    cpu.requireSse();
    const data = new Uint8Array(bytes);
    if (insn.memory) cpu.readLinear(address(cpu, insn, part, false), data);
    const { state } = cpu;
    state.load();
    if (!insn.memory) data.set(state.xmm(insn.rm).subarray(from, from + bytes));
    const register = state.xmm(insn.reg);
    if (insn.memory ? zeroMemory : zeroRegister) register.fill(0);
    register.set(data, at);
    state.touchSse();
    state.store();
  };
}

function store(part: Part): Definition['run'] {
  const { bytes, at = 0, zeroRegister = false } = part;
  return (cpu, insn) => {
    cpu.requireSse();
    const { state } = cpu;
    if (insn.memory) {
      const linear = address(cpu, insn, part, true);
      state.load();
      cpu.writeLinear(linear, state.xmm(insn.reg).subarray(at, at + bytes));
      return;
    }
    state.load();
    const data = state.xmm(insn.reg).slice(at, at + bytes);
    const register = state.xmm(insn.rm);
    if (zeroRegister) register.fill(0);
    register.set(data);
    state.touchSse();
    state.store();
  };
}

/** MOVSLDUP, MOVSHDUP and MOVDDUP: the register from chosen 4-byte lanes of the source. */
function duplicate(lanes: readonly number[], bytes: number): Definition['run'] {
  return (cpu, insn) => {
    cpu.requireSse();
    const data = new Uint8Array(16);
    const read = data.subarray(0, bytes);
    if (insn.memory) cpu.readLinear(address(cpu, insn, { bytes, aligned: bytes === 16 }, false), read);
    const { state } = cpu;
    state.load();
    if (!insn.memory) data.set(state.xmm(insn.rm));
    const register = state.xmm(insn.reg);
    lanes.forEach((lane, i) => {
      register.set(data.subarray(lane * 4, lane * 4 + 4), i * 4);
    });
    state.touchSse();
    state.store();
  };
}

/** MOVD and MOVQ from a general register or memory. */
function movToXmm(cpu: GuestCpu, insn: Instruction): void {
  cpu.requireSse();
  const value = cpu.readRm(insn, insn.rexW ? 8 : 4);
  const { state } = cpu;
  state.load();
  const register = state.xmm(insn.reg);
  register.fill(0);
  new DataView(register.buffer, register.byteOffset, 16).setBigUint64(0, value, true);
  state.touchSse();
  state.store();
}

/** MOVD and MOVQ to a general register or memory. */
function movFromXmm(cpu: GuestCpu, insn: Instruction): void {
  cpu.requireSse();
  const size = insn.rexW ? 8 : 4;
  cpu.state.load();
  const register = cpu.state.xmm(insn.reg);
  const value = new DataView(register.buffer, register.byteOffset, 16).getBigUint64(0, true);
  if (insn.memory) cpu.writeMemoryNumber(insn, size, value);
  else cpu.setGpr(insn.rm, size, value);
}

const { NONE, P66, PF2, PF3 } = prefix;
const any = {};
const memory = { form: 'memory' } as const;
const whole = { bytes: 16 } as const;
const aligned = { bytes: 16, aligned: true } as const;
const scalar = (bytes: number) => ({ bytes, zeroMemory: true }) as const;
const low = { bytes: 8 } as const;
const high = { bytes: 8, at: 8 } as const;

const move = (kind: string, opcode: number, prefixes: number[], run: Definition['run'], modrm = any): Definition => {
  return { kind, map: 1, opcode, prefixes, modrm, run };
};

export const sseMoves: readonly Definition[] = [
  move('movups', 0x10, [NONE, P66], load(whole)),
  move('movss', 0x10, [PF3], load(scalar(4))),
  move('movsd', 0x10, [PF2], load(scalar(8))),
  move('movups', 0x11, [NONE, P66], store(whole)),
  move('movss', 0x11, [PF3], store({ bytes: 4 })),
  move('movsd', 0x11, [PF2], store({ bytes: 8 })),
  move('movhlps', 0x12, [NONE], load({ bytes: 8, from: 8 })),
  move('movlpd', 0x12, [P66], load(low), memory),
  move('movsldup', 0x12, [PF3], duplicate([0, 0, 2, 2], 16)),
  move('movddup', 0x12, [PF2], duplicate([0, 1, 0, 1], 8)),
  move('movlps', 0x13, [NONE, P66], store(low), memory),
  move('movhps', 0x16, [NONE], load(high)),
  move('movhpd', 0x16, [P66], load(high), memory),
  move('movshdup', 0x16, [PF3], duplicate([1, 1, 3, 3], 16)),
  move('movhps', 0x17, [NONE, P66], store(high), memory),
  move('movaps', 0x28, [NONE, P66], load(aligned)),
  move('movaps', 0x29, [NONE, P66], store(aligned)),
  move('movntps', 0x2b, [NONE, P66], store(aligned), memory),
  move('movd', 0x6e, [P66], movToXmm),
  move('movdqa', 0x6f, [P66], load(aligned)),
  move('movdqu', 0x6f, [PF3], load(whole)),
  move('movd', 0x7e, [P66], movFromXmm),
  move('movq', 0x7e, [PF3], load({ bytes: 8, zeroMemory: true, zeroRegister: true })),
  move('movdqa', 0x7f, [P66], store(aligned)),
  move('movdqu', 0x7f, [PF3], store(whole)),
  move('movq', 0xd6, [P66], store({ bytes: 8, zeroRegister: true })),
  move('movntdq', 0xe7, [P66], store(aligned), memory),
  move('lddqu', 0xf0, [PF2], load(whole), memory),
];
